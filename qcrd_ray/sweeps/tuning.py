"""The trials of a sweep under Ray Tune."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qcrd_ray.errors import last_line
from qcrd_ray.sweeps.display import SweepDisplay
from qcrd_ray.sweeps.plan import OUTCOMES, Plan
from qcrd_ray.sweeps.queue import METRIC, TrialQueue
from qcrd_ray.sweeps.room import concurrent_trials
from qcrd_ray.sweeps.schedulers import StopsInOrder, scheduler_of
from qcrd_ray.sweeps.space import Trial
from qcrd_ray.sweeps.trial import FAILED, FINISHED, INTERRUPTED, STOPPED, StopFlag, run_trial
from qcrd_ray.training.placement import remove_group
from qcrd_ray.training.stopping import Stop

HEAD = "node:__internal_head__"
"""A resource of the node that lives as long as the cluster: a trial's own driver runs there and takes no CPU."""
STOP_POLL_SECONDS = 0.5


def run_trials(plan: Plan, stop: Stop) -> None:
    """Run what of a sweep is not done yet; end in good order where `stop` is asked."""
    settings = plan.settings
    finished = plan.finished()
    # What failed is tried again.
    outcomes = {name: outcome for name, outcome in plan.outcomes().items() if outcome["status"] == STOPPED}
    stopped = {name: outcome["accuracy"] for name, outcome in outcomes.items()}
    needed = {trial.needs for trial in plan.trials.values() if trial.name not in {*finished, *stopped}}
    trials = [trial for trial in plan.trials.values() if trial.point is not None or trial.name in needed]
    # It lives and dies with the driver, on no node that may go.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    flag = ray.remote(StopFlag).options(num_cpus=0, scheduling_strategy=here).remote()

    def launch(trial: Trial) -> dict[str, Any]:
        return {
            "trial": trial.name,
            "config": plan.launched(trial).model_dump(mode="json"),
            "flag": flag,
            "keep_checkpoints": settings.keep_checkpoints,
            "compared": trial.point is not None,
        }

    queue = TrialQueue(trials, launch, finished, stopped, plan.proposer, lambda point: plan.add([point]))
    if not queue.fill():
        return
    room = settings.max_concurrent_trials or min(map(concurrent_trials, plan.configs()))
    display = SweepDisplay(str(plan.folder), plan.base.train.max_steps, room)
    for trial in [*trials, *queue.waiting]:
        status = FINISHED if trial.name in finished else STOPPED if trial.name in stopped else "waiting"
        display.add(trial.name, plan.run(trial.name), status, finished.get(trial.name, stopped.get(trial.name)))
    with tempfile.TemporaryDirectory(prefix="qcrd_ray-tune-") as place, display, _watching(stop, queue, flag):
        tune.Tuner(
            tune.with_resources(run_trial, {HEAD: 0.001}),
            param_space={},
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                search_alg=queue,
                scheduler=StopsInOrder(scheduler_of(settings, plan.base.train.max_steps), flag),
                num_samples=10**6,  # the queue says when it is empty
                max_concurrent_trials=room,
                trial_name_creator=lambda trial: trial.config["trial"],
                trial_dirname_creator=lambda trial: trial.config["trial"],
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=place,  # nothing of Tune's own has to outlive the driver
                failure_config=tune.FailureConfig(max_failures=settings.max_failures),
                callbacks=[_Recorder(plan, outcomes, display)],
                verbose=0,
            ),
        ).fit()


class _Recorder(tune.Callback):
    """Tells the display what happens to trials, and keeps what came of those that leave no result."""

    def __init__(self, plan: Plan, outcomes: dict[str, dict[str, Any]], display: SweepDisplay) -> None:
        self.plan, self.outcomes, self.display = plan, outcomes, display

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune keeps a copy to restore an experiment from, and a sweep goes on from its trials' runs."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        self.display.add(name, self.plan.run(name))
        self.display.started(name)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if METRIC in result and "status" not in result:
            self.display.evaluated(trial.config["trial"], result["step"], result[METRIC])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name, last = trial.config["trial"], trial.last_result or {}
        status = last.get("status", INTERRUPTED)
        if status in (STOPPED, FAILED):
            reason = last.get("reason") or f"stopped by {self.plan.settings.scheduler} at step {last.get('step')}"
            self._keep(name, status, reason, last)
        self.display.ended(name, status, last.get(METRIC), last.get("reason", ""))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        remove_group(self.plan.run(name))
        tries = self.plan.settings.max_failures + 1
        error = trial.get_error()
        reason = f"failed {tries} time(s), last with: {last_line(error) if error else 'no reason is known'}"
        self._keep(name, FAILED, reason, trial.last_result or {})
        self.display.ended(name, FAILED, None, reason)

    def _keep(self, name: str, status: str, reason: str, last: Mapping[str, Any]) -> None:
        self.outcomes[name] = {
            "status": status, "reason": reason, "step": last.get("step", 0), "accuracy": last.get(METRIC),
        }  # fmt: skip
        self.plan.folder.write(OUTCOMES, json.dumps(self.outcomes, indent=1) + "\n")


@contextmanager
def _watching(stop: Stop, queue: TrialQueue, flag: Any) -> Iterator[None]:
    """Where the sweep is asked to end, no trial is begun and those that run end with a checkpoint."""
    end = threading.Event()

    def watch() -> None:
        while not end.wait(STOP_POLL_SECONDS):
            if stop.asked:
                queue.close()
                ray.get(flag.stop_all.remote())
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(timeout=5)
