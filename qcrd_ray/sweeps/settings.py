"""The keys of a sweep that are not those of its runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from qcrd_ray.config import FOLDER_NAME, NonNegative, Positive, Section


class SweepSettings(Section):
    """How a space is searched. `python tune/sweep.py key=value` takes these keys beside those of the config."""

    name: str | None = Field(None, description="Name of the sweep's folder. Default: sweep, task, axes and a hash.")
    seeds: Positive = Field(1, description="Seeds that every point is run with, from train.seed on.")
    searcher: Literal["grid", "random", "optuna"] = Field(
        "grid", description="Every point of the space, or trials=N points at random or as Optuna's TPE proposes them."
    )
    trials: Positive = Field(16, description="Points that random and optuna try, each with all seeds.")
    scheduler: Literal["none", "asha", "median"] = Field(
        "none",
        description="End trials early that fall behind in accuracy on the validation split; needs train.eval_interval.",
    )
    grace_steps: Positive | None = Field(
        None, description="Steps that a scheduler gives every trial. Default: a quarter of train.max_steps."
    )
    reduction_factor: Annotated[float, Field(gt=1.0)] = Field(
        3.0, description="ASHA goes on with one in so many trials at each rung."
    )
    max_concurrent_trials: Positive | None = Field(
        None, description="Trials at once. Default: as many as the cluster has room for when the sweep begins."
    )
    max_failures: NonNegative = Field(
        2, description="Times a trial is started again from its checkpoint before it counts as failed."
    )
    keep_checkpoints: bool = Field(
        False, description="Keep checkpoints and snapshots of trials that have finished, beside their students."
    )

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str | None) -> str | None:
        if name is not None and not FOLDER_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no folder name; letters, digits, '.', '_', '+' and '-' are, 128 at most")
        return name
