"""Schedulers of Ray Tune, whose decision to stop a trial ends it in good order."""

from __future__ import annotations

from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from qcrd_ray.sweeps.queue import METRIC
from qcrd_ray.sweeps.settings import SweepSettings


def scheduler_of(settings: SweepSettings, max_steps: int) -> TrialScheduler:
    """The scheduler that the settings name, over steps."""
    grace = settings.grace_steps or max(1, max_steps // 4)
    if settings.scheduler == "asha":
        return ASHAScheduler(
            time_attr="step",
            max_t=max_steps + 1,  # the last evaluation is no reason to stop
            grace_period=grace,
            reduction_factor=settings.reduction_factor,
            stop_last_trials=False,
        )
    if settings.scheduler == "median":
        return MedianStoppingRule(time_attr="step", grace_period=grace)
    return FIFOScheduler()


class StopsInOrder(TrialScheduler):
    """Another scheduler, except that a trial that it stops is asked to end, and that it sees no trial that only makes a
    student for others.

    Tune kills the actor of a trial that is stopped. What Ray Train had reserved for it would stay reserved, and the
    next trial would wait for it; asked to end, a trial writes a checkpoint and gives back what it holds.
    """

    def __init__(self, scheduler: TrialScheduler, flag: Any) -> None:
        """
        Args:
            flag: handle of the sweep's StopFlag.
        """
        super().__init__()
        self.scheduler, self.flag = scheduler, flag
        self.asked: set[str] = set()

    @property
    def supports_buffered_results(self) -> bool:
        return False

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune keeps a copy to restore an experiment from, and a sweep goes on from its trials' runs."""
        return {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return bool(self.scheduler.set_search_properties(metric, mode, **spec))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self.scheduler.on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self.scheduler.on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        name = trial.config["trial"]
        if trial.config["compared"] and name not in self.asked and METRIC in result and "status" not in result:
            decision = self.scheduler.on_trial_result(tune_controller, trial, result)
            if decision == TrialScheduler.STOP:
                self.asked.add(name)
                self.flag.stop_trial.remote(name)
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.scheduler.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self.scheduler.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        return self.scheduler.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        return str(self.scheduler.debug_string())
