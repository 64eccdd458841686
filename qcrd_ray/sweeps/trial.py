"""One trial: a run of the training job inside Ray Tune, which hears of every evaluation."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from qcrd_ray.config import ExperimentConfig, config_from_dict
from qcrd_ray.errors import Stopped, UserError, find_user_error
from qcrd_ray.run_folder import CHECKPOINTS, EVALUATIONS_SUMMARY, METRICS, SNAPSHOTS, RunFolder
from qcrd_ray.training.stopping import Stop

logger = logging.getLogger(__name__)

POLL_SECONDS, REMOTE_POLL_SECONDS = 1.0, 5.0
JUDGE_READY = "judge_ready"
FINISHED, FAILED, STOPPED, INTERRUPTED = "finished", "failed", "stopped", "interrupted"


class StopFlag:
    """Tells trials, wherever they run, to end with a checkpoint: all of them, or one by one. A Ray actor."""

    def __init__(self) -> None:
        self.all = False
        self.trials: set[str] = set()

    def stop_all(self) -> None:
        self.all = True

    def stop_trial(self, name: str) -> None:
        self.trials.add(name)

    def get(self, name: str) -> str | None:
        """What a trial is to end as, None where it is to go on."""
        return STOPPED if name in self.trials else INTERRUPTED if self.all else None


def run_trial(settings: dict[str, Any]) -> None:
    """A function trainable of Ray Tune: trains by a TorchTrainer, goes on where an earlier try stopped.

    It reports {JUDGE_READY: True} once steps are trained or the discriminator is pretrained, {"step", "accuracy"} for
    each evaluation on the validation split, and at the end {"status": finished |
    failed | stopped | interrupted, "reason"}. What only the user can mend is such a failure; any other error is raised,
    and Tune starts the trial again.

    Args:
        settings: `trial`, its name; `config`, a whole config as a mapping; `flag`, the handle of the sweep's StopFlag;
            `keep_checkpoints`, those of a trial that has finished too.
    """
    from ray import tune

    config = config_from_dict(settings["config"])
    run = RunFolder(config.run.storage_path, config.run_name, config.run.storage_timeout_s)
    stop = Stop()
    training = _Training(config, stop)
    training.start()
    news = _News(run)
    poll = POLL_SECONDS if run.root is not None else REMOTE_POLL_SECONDS
    asked: str | None = None
    last: dict[str, Any] = {}
    while training.is_alive():
        training.join(poll)
        asked = ray.get(settings["flag"].get.remote(settings["trial"]))
        if asked:
            stop.ask()
        for report in news.take():
            last = report if "accuracy" in report else last
            tune.report(report)
    outcome = training.outcome()
    if outcome["status"] == INTERRUPTED and asked == STOPPED:
        outcome = {**last, "status": STOPPED}
    if outcome["status"] == FINISHED and not settings["keep_checkpoints"]:
        remove_checkpoints(run)
    tune.report(outcome)


def remove_checkpoints(run: RunFolder) -> None:
    """Remove what only a training that goes on would need; the student that a finished run reports is in `student/`."""
    for name in (CHECKPOINTS, SNAPSHOTS):
        try:
            run.remove(name)
        except UserError as error:
            logger.warning("not removed: %s", error)


class _Training(threading.Thread):
    """The training job in a thread, so that the trial can report beside it."""

    def __init__(self, config: ExperimentConfig, stop: Stop) -> None:
        super().__init__(name="training", daemon=True)
        self.config, self.stop_request = config, stop
        self.result: dict[str, Any] | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        from qcrd_ray.training.trainer import train

        try:
            self.result = train(self.config, self.stop_request)
        except BaseException as error:
            self.error = error

    def outcome(self) -> dict[str, Any]:
        """What the trial ends with. Raises what another try may mend."""
        if self.error is None:
            assert self.result is not None
            return {"status": FINISHED, "step": self.result["steps"], "accuracy": selecting_accuracy(self.result)}
        if isinstance(self.error, Stopped):
            return {"status": INTERRUPTED}
        told: UserError | None = find_user_error(self.error)
        if told is None:
            raise self.error
        return {"status": FAILED, "reason": str(told)}


class _News:
    """What became known of a run since it was last asked for."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.judge_ready = False
        self.seen = 0

    def take(self) -> list[dict[str, Any]]:
        try:
            if not self.run.exists():
                return []
            begins = not self.judge_ready and self.run.exists(METRICS)
            found = evaluations_on_valid(self.run.read_json(EVALUATIONS_SUMMARY) or [])
        except (UserError, OSError, ValueError):
            return []  # the training says what is wrong with its storage; a file may be under way
        self.judge_ready = self.judge_ready or begins
        fresh = [e for e in found if e["step"] > self.seen]
        self.seen = max([self.seen, *(e["step"] for e in found)])
        reports = [{"step": e["step"], "accuracy": e["accuracy"]} for e in fresh]
        return [{JUDGE_READY: True}, *reports] if begins else reports


def evaluations_on_valid(evaluations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of the trained student on the validation split, in the order of their steps."""
    chosen = [e for e in evaluations if e["split"] == "valid" and e["step"] > 0]
    return sorted(chosen, key=lambda e: int(e["step"]))


def selecting_accuracy(result: Mapping[str, Any]) -> float:
    """What a finished run is compared by: its best on the validation split, or what is reported where it has none."""
    found = [e["accuracy"] for e in evaluations_on_valid(result["evaluations"])]
    return float(max(found) if found else result["accuracy"]["after"])
