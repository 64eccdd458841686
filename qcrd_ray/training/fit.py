"""Training itself, as the driver sees it: Ray Train's workers, how they are ended, and what a failure is told as."""

from __future__ import annotations

import logging
import tempfile
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError, find_user_error
from qcrd_ray.run_folder import RunFolder
from qcrd_ray.training.checkpoint import checkpoint_steps
from qcrd_ray.training.loop import WorkerSpec, train_worker
from qcrd_ray.training.placement import Deadline, InPlacementGroup, StopOnUserError, train_settings
from qcrd_ray.training.stopping import POLL_SECONDS, Stop

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 10
"""In which an actor on the driver's node that lives has answered."""


def fit(config: ExperimentConfig, run: RunFolder, spec: WorkerSpec, group: PlacementGroup, stop: Stop) -> None:
    """Train to the last step.

    Raises:
        UserError: it ended before, for a reason that a user can mend.
        KeyboardInterrupt: it was asked to end.
    """
    from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError

    from qcrd_ray.training.process_group import ProcessGroupConfig
    from qcrd_ray.training.torch_trainer import LeanTrainer

    gpu = config.train.gpus_per_worker > 0
    resources = {"CPU": config.train.cpus_per_worker}
    if gpu:
        resources["GPU"] = config.train.gpus_per_worker
    with tempfile.TemporaryDirectory(prefix="qcrd_ray-train-", ignore_cleanup_errors=True) as folder:
        trainer = LeanTrainer(
            _train_loop,
            train_loop_config={"spec": spec},
            scaling_config=ScalingConfig(num_workers=config.train.workers, use_gpu=gpu, resources_per_worker=resources),
            torch_config=ProcessGroupConfig(
                backend="cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=config.train.collective_timeout_s
            ),
            # Ray Train resumes silently under a name it knows; what is resumed is decided by our own checkpoints, and
            # nothing of Ray Train's own has to outlive the driver.
            run_config=RunConfig(
                name=f"train-{uuid.uuid4().hex[:8]}",
                storage_path=folder,
                failure_config=FailureConfig(max_failures=config.train.max_failures),
                callbacks=[StopOnUserError(), InPlacementGroup(group, train_settings(config)), Deadline(config)],
            ),
        )
        try:
            _until_stopped(trainer.fit, spec.service, stop)
        except (ControllerError, WorkerGroupError) as error:
            told = told_as(config, run, error, stop.asked)
            if told is None:
                raise
            raise told from None


def told_as(config: ExperimentConfig, run: RunFolder, error: Exception, stopping: bool) -> BaseException | None:
    """What is raised where training has failed, None where it is the error itself.

    Args:
        stopping: it was asked to end. Who ends a whole process group also ends the workers, in the middle of a step.
    """
    reason = find_user_error(error) or (None if stopping else _deaths(config, error))
    if reason is not None:
        return UserError(f"{reason}; {_where_it_stands(run)}")
    if stopping:
        logger.warning("training failed as it was asked to stop: %s", " ".join(str(error).split())[:300])
        return KeyboardInterrupt()
    return None


def _until_stopped(fit: Callable[[], object], service: Any, stop: Stop) -> None:
    """Call `fit`, and end it in good order where `stop` is asked: Ray Train's own way ends it without a checkpoint."""
    fitted: Future[None] = Future()

    def call() -> None:
        try:
            fit()
            fitted.set_result(None)
        except BaseException as error:
            fitted.set_exception(error)

    with stop.orderly():
        # Beside the main thread, for Ray Train would take the signals there.
        threading.Thread(target=call, name="ray-train", daemon=True).start()
        told = False
        while not wait([fitted], timeout=POLL_SECONDS).done:
            if stop.asked and not told:
                told = True
                if not _steps_end(service):
                    raise KeyboardInterrupt
                logger.warning("asked to stop: the step at hand ends with a checkpoint; asked again, it ends at once")
        fitted.result()
    stop.check()


def _steps_end(service: Any) -> bool:
    """Have training end after the step at hand. False where no step is trained, or where what trains is gone.

    Who ends a whole process group (`timeout`, a batch system) also ends a Ray that the driver has started.
    """
    try:
        return bool(ray.get(service.stop.remote(), timeout=ANSWER_SECONDS))
    except ray.exceptions.RayError:
        return False


def _deaths(config: ExperimentConfig, error: Exception) -> str | None:
    """One line where workers died and no code of ours failed."""
    failures = getattr(error, "worker_failures", None) or {}
    reasons = {rank: failure for rank, failure in failures.items() if not _is_consequence(failure)}
    if failures and all(isinstance(_cause(failure), ray.exceptions.RayError) for failure in reasons.values()):
        rank, failure = next(iter((reasons or failures).items()))
        return (
            f"training workers failed {config.train.max_failures + 1} times (train.max_failures="
            f"{config.train.max_failures}), the last time worker {rank}: {' '.join(str(failure).split())[:300]}"
        )
    return None


def _cause(failure: BaseException) -> BaseException:
    return getattr(failure, "cause", None) or failure


def _is_consequence(failure: BaseException) -> bool:
    """Whether a worker only lost the connection to another one."""
    return "Connection closed by peer" in str(failure) or "Connection reset by peer" in str(failure)


def _where_it_stands(run: RunFolder) -> str:
    try:
        steps = checkpoint_steps(run)
    except UserError:
        return "the last checkpoint is as it was"
    return f"the same command goes on from step {steps[-1]}" if steps else "there is no checkpoint yet"


def _train_loop(settings: dict[str, Any]) -> None:
    train_worker(settings["spec"])
