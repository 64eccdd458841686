"""Training workers and samplers in one placement group, and how Ray Train is made to end where it would wait for ever.

The callbacks run inside Ray Train's controller, an actor on the driver's node.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError, find_user_error
from qcrd_ray.rationales.streaming import DATA_CPUS
from qcrd_ray.ray_session import await_resources, cluster_state
from qcrd_ray.run_folder import RunFolder

START_SECONDS = 60
"""Ray Train tries to start its workers for so long, then again."""


def train_settings(config: ExperimentConfig) -> dict[str, str]:
    """Environment of Ray Train: a dead worker is seen within a second, one that hangs within minutes."""
    return {
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths of the config mean the same in every process
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(config.train.collective_timeout_s),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(min(START_SECONDS, config.run.placement_timeout_s)),
        # Ray Train's own default lets a worker that waits for a dead one hold up the restart for half a minute.
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    }


@contextmanager
def placed(
    config: ExperimentConfig, run: RunFolder, check: Callable[[], None] = lambda: None
) -> Iterator[PlacementGroup]:
    """The placement group of all training workers, then all samplers; gone at the end.

    Args:
        run: that is placed; what an earlier driver of it has left is removed.
        check: called each second of the wait for it; raises where nobody wants it any more.

    Raises:
        UserError: the cluster has not had room for it within `run.placement_timeout_s`.
    """
    train, sampler = config.train, config.sampler
    bundles = [_bundle(train.cpus_per_worker, train.gpus_per_worker)] * train.workers
    bundles += [_bundle(sampler.cpus, sampler.gpus)] * sampler.actors
    labels = [dict(train.node_labels)] * train.workers + [dict(sampler.node_labels)] * sampler.actors
    remove_group(run)
    group = placement_group(
        bundles, strategy="PACK", name=_group_name(run), bundle_label_selector=labels if any(labels) else None
    )
    try:
        end = time.monotonic() + config.run.placement_timeout_s
        while not group.wait(max(0.0, min(1.0, end - time.monotonic()))):
            check()
            if time.monotonic() < end:
                continue
            raise UserError(
                f"not enough resources after {config.run.placement_timeout_s:g} s (run.placement_timeout_s): "
                f"{describe_resources(config)}"
            )
        wanted = sum(bundle.get("CPU", 0.0) for bundle in bundles) + DATA_CPUS
        await_resources({"CPU": wanted}, config.run.placement_timeout_s, lambda: describe_resources(config))
        yield group
    finally:
        remove_placement_group(group)


def remove_group(run: RunFolder) -> None:
    """Remove a run's placement group, if there is one.

    A group that an actor has made lives as long as its job: where the driver of a trial dies, nobody else removes it.
    """
    try:
        group = get_placement_group(_group_name(run))
    except ValueError:
        return
    remove_placement_group(group)


def _group_name(run: RunFolder) -> str:
    return f"qcrd_ray {run}"


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    bundle = {"CPU": float(cpus), "GPU": float(gpus)}
    # A bundle must ask for something.
    return {name: amount for name, amount in bundle.items() if amount} or {"CPU": 0.001}


def sampler_place(config: ExperimentConfig, group: PlacementGroup, index: int) -> PlacementGroupSchedulingStrategy:
    """Where sampler number `index` runs."""
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=config.train.workers + index)


def describe_resources(config: ExperimentConfig) -> str:
    """What the run asks for and what the cluster has, in one line."""
    train, sampler = config.train, config.sampler
    return (
        f"asked for {train.workers} workers of {train.cpus_per_worker:g} CPU and {train.gpus_per_worker:g} GPU"
        f"{_labelled(train.node_labels)}, {sampler.actors} samplers of {sampler.cpus:g} CPU and {sampler.gpus:g} GPU"
        f"{_labelled(sampler.node_labels)}, and {DATA_CPUS:g} CPU for data; {cluster_state()}"
        f"{_there(train.node_labels)}{_there(sampler.node_labels) if sampler.node_labels != train.node_labels else ''}"
    )


def _labelled(labels: dict[str, str]) -> str:
    return f" on nodes with {', '.join(f'{key}={value}' for key, value in labels.items())}" if labels else ""


def _there(labels: dict[str, str]) -> str:
    """What nodes with these labels have together."""
    if not labels:
        return ""
    nodes = [node for node in ray.nodes() if node["Alive"] and labels.items() <= node["Labels"].items()]
    cpus, gpus = (sum(node["Resources"].get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    shown = ", ".join(f"{key}={value}" for key, value in labels.items())
    return f"; with {shown} there are {len(nodes)} nodes with {cpus:g} CPU and {gpus:g} GPU in all"


class StopOnUserError(UserCallback):
    """What only the user can mend is not tried again."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            told = find_user_error(error)
            if told is not None:
                raise UserError(str(told))


class InPlacementGroup(ControllerCallback):
    """Has Ray Train take the first bundles of a group that is there; by itself it would always make one of its own."""

    def __init__(self, group: PlacementGroup, settings: dict[str, str]) -> None:
        self.group = group
        self.settings = settings

    def after_controller_start(self, train_run_context: Any) -> None:
        from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
        from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

        os.environ.update(self.settings)
        group = self.group

        class Shared(DefaultPlacementGroupHandle):
            def shutdown(self) -> None:
                """The driver removes the group."""

        if not callable(getattr(WorkerGroup, "_create_placement_group", None)):
            raise RuntimeError(f"Ray {ray.__version__} makes its placement groups in another way than 2.60 does")
        WorkerGroup._create_placement_group = lambda workers, scaling, context: Shared(group)


class Deadline(ControllerCallback):
    """Ends a run that has not been running for `run.placement_timeout_s`: Ray Train would try for ever."""

    def __init__(self, config: ExperimentConfig) -> None:
        self.config = config
        self.since: float | None = None

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        name = current_state._state_type.state_name
        if name == "RUNNING":
            self.since = None
            return
        self.since = self.since or time.monotonic()
        waited = time.monotonic() - self.since
        if name == "RESCHEDULING" and waited > self.config.run.placement_timeout_s:
            raise UserError(
                f"training workers could not be placed for {waited:.0f} s (run.placement_timeout_s="
                f"{self.config.run.placement_timeout_s}): {describe_resources(self.config)}"
            )
