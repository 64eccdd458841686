"""What a sweep is to run, and what it finds of itself, without running it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qcrd_ray.config import config_from_dict
from qcrd_ray.errors import UserError
from qcrd_ray.sweeps.plan import Plan, check_plan
from qcrd_ray.sweeps.proposals import PROPOSALS
from qcrd_ray.sweeps.settings import SweepSettings
from qcrd_ray.sweeps.space import Axis, Choice, axis_of_key, cross

LR = cross([axis_of_key("optim.lr", {"loguniform": [1e-5, 1e-2]}), axis_of_key("scheme", ["min_max", "mean"])])


def plan_of(folder: Path | str, space: Any, config: dict[str, Any] | None = None, **settings: Any) -> Plan:
    given = {"task": "chain_sum", **(config or {})}
    given["run"] = {"storage_path": str(folder)}
    return Plan(SweepSettings(name="s", **settings), config_from_dict(given), space)


def result(accuracy: float, split: str = "test", valid: float | None = None) -> dict[str, Any]:
    evaluations = [{"split": "test", "step": 10, "accuracy": accuracy}]
    evaluations += [{"split": "valid", "step": 10, "accuracy": valid}] if valid is not None else []
    train = {"single_sample_accuracy": 0.75, "vote_accuracy": 0.9}
    return {
        "accuracy": {"after": accuracy, "before": 0.0, "n": 4, "split": split, "step": 10},
        "evaluations": evaluations, "seconds": 1.0, "steps": 10, "train_tokens_per_second": 1.0,
        "judge": {"pretrained_steps": 0, "reused": False}, "teacher": {"sampled": 0, "reused": 0},
        "data": {"simulated": True, "train": train},
        "negatives": {"used": 0, "active_fraction": 0.0, "stall_fraction": 0.0},
    }  # fmt: skip


def finish(plan: Plan, name: str, **keys: Any) -> None:
    run = plan.run(name)
    run.create()
    run.write("result.json", json.dumps(result(**keys)))


def test_random_points_that_are_drawn_twice_are_one_and_the_default_is_among_them(tmp_path: Path) -> None:
    space = cross([axis_of_key("scheme", ["min_max", "mean"])])
    plan = plan_of(tmp_path, space, searcher="random", trials=8, seeds=2)
    assert list(plan.points) == ["scheme=min_max", "scheme=mean"]
    assert len(plan.trials) == 4
    assert plan_of(tmp_path, LR, searcher="random", trials=3).default is not None
    assert "lr=5e-05, scheme=min_max" in plan_of(tmp_path, LR, searcher="random", trials=3).points


def test_what_optuna_had_proposed_is_known_when_a_sweep_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    first = plan_of(tmp_path, LR, searcher="optuna", trials=4)
    assert list(first.points) == ["lr=5e-05, scheme=min_max"]  # the default
    first.folder.create()
    assert first.proposer is not None
    points = [first.proposer.propose() for _ in range(2)]
    [trial] = first.add([points[0]])  # type: ignore[list-item]
    finish(first, trial.name, accuracy=0.5)
    again = plan_of(tmp_path, LR, searcher="optuna", trials=4)
    assert list(again.points) == ["lr=5e-05, scheme=min_max", str(points[0]), str(points[1])]
    assert again.finished() == {trial.name: 0.5}
    (tmp_path / "s" / PROPOSALS).write_text(json.dumps([{"lr": 1e-3, "scheme": "gone"}]))
    with pytest.raises(UserError, match="gone was proposed in an earlier start"):
        plan_of(tmp_path, LR, searcher="optuna")


def test_accuracy_on_valid_is_only_that(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, cross([axis_of_key("scheme", ["min_max", "mean"])]))
    one, two = plan.trials
    finish(plan, one, accuracy=0.5, valid=0.75)
    finish(plan, two, accuracy=0.25)
    assert [(row.accuracy, row.valid_accuracy) for row in plan.rows()] == [(0.5, 0.75), (0.25, None)]
    assert plan.finished() == {one: 0.75, two: 0.25}
    assert all(row.teacher_simulated for row in plan.rows())
    assert {(row.teacher_accuracy, row.vote_accuracy) for row in plan.rows()} == {(0.75, 0.9)}


def test_a_trial_whose_student_was_not_made_says_so(tmp_path: Path) -> None:
    source = Axis("source", "", (Choice("fixed", {"negatives.source": "fixed"}, pretrained={"method": "dss"}),))
    plan = plan_of(tmp_path, cross([source]))
    maker, taker = plan.trials
    assert [(row.trial, row.status) for row in plan.rows()] == [(taker, "missing")]
    plan.folder.create()
    plan.folder.write("outcomes.json", json.dumps({maker: {"status": "failed", "reason": "no disk"}}))
    [row] = plan.rows()
    assert (row.status, row.reason) == ("failed", f"{maker}: no disk")


def test_places_of_a_bucket_with_options() -> None:
    bucket = "s3://b/sweeps?endpoint_override=127.0.0.1:9000&scheme=http"
    plan = plan_of(bucket, cross([axis_of_key("scheme", ["mean"])]))
    assert plan.place("trials") == "s3://b/sweeps/s/trials?endpoint_override=127.0.0.1:9000&scheme=http"
    [trial] = plan.trials.values()
    assert plan.launched(trial).judge.store == "s3://b/sweeps/s?endpoint_override=127.0.0.1:9000&scheme=http"


def test_a_live_teacher_s_samples_are_in_one_place(tmp_path: Path) -> None:
    live = {"teacher": {"engine": "openai", "model": "m"}}
    plan = plan_of(tmp_path, cross([axis_of_key("teacher.samples", [1, 5])]), live)
    stores = {plan.launched(trial).teacher.store for trial in plan.trials.values()}
    assert stores == {str(tmp_path / "s" / "samples")}
    assert all(plan.launched(trial).teacher.store_timeout_s >= 3600 for trial in plan.trials.values())
    own = {"teacher": {**live["teacher"], "store": str(tmp_path / "own")}}
    plan = plan_of(tmp_path, cross([axis_of_key("teacher.samples", [1, 5])]), own)
    assert {plan.launched(trial).teacher.store for trial in plan.trials.values()} == {str(tmp_path / "own")}


def test_every_corner_of_what_optuna_may_propose_is_checked(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    models = axis_of_key("student.model", ["scratch:t5-tiny", "scratch:t5-none"])
    config = {"data": {"path": "generated:chain_sum"}, "teacher": {"engine": "scripted"}}
    with pytest.raises(UserError, match="point model=scratch:t5-none: config key student.model"):
        check_plan(plan_of(tmp_path, cross([models]), config, searcher="optuna"))
    steps = cross([axis_of_key("train.max_steps", [10, 20])])
    with pytest.raises(UserError, match="compares trials of one length"):
        check_plan(plan_of(tmp_path, steps, {**config, "train": {"eval_interval": 5}}, scheduler="asha"))
    assert not any(tmp_path.iterdir())
