"""Which trial runs next: in order, but none before what it needs is there."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ray.tune.search import Searcher

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError
from qcrd_ray.seeding import stable_hash
from qcrd_ray.sweeps.proposals import OptunaProposer
from qcrd_ray.sweeps.space import Point, Trial
from qcrd_ray.sweeps.trial import FINISHED, JUDGE_READY

logger = logging.getLogger(__name__)

METRIC = "accuracy"


class TrialQueue(Searcher):
    """A searcher of Ray Tune that gives out the trials of a sweep.

    A trial waits while the run whose student it needs is not finished, and while another trial pretrains the
    discriminator that it will share. Points of a proposer are asked for when nothing else waits.
    """

    def __init__(
        self,
        trials: Iterable[Trial],
        launch: Callable[[Trial], dict[str, Any]],
        finished: Mapping[str, float],
        stopped: Mapping[str, float | None],
        proposer: OptunaProposer | None = None,
        expand: Callable[[Point], list[Trial]] | None = None,
    ) -> None:
        """
        Args:
            trials: in the order that they are to run in.
            launch: what a trial is started with.
            finished: accuracies of the trials that have ended well before, by name; those are not run again.
            stopped: what those had reached that a scheduler has stopped before; nor are they.
            expand: the trials of a point that the proposer gives, one for each seed.
        """
        super().__init__(metric=METRIC, mode="max")
        self.launch = launch
        self.finished, self.scores = set(finished), dict(finished)
        self.scores |= {name: accuracy for name, accuracy in stopped.items() if accuracy is not None}
        self.proposer, self.expand = proposer, expand
        self.points: dict[str, list[str]] = {}
        self.open_points: dict[str, Point] = {}
        self.waiting: list[Trial] = []
        self.running: dict[str, Trial] = {}
        self.pretraining: dict[str, str] = {}
        self.pretrained: set[str | None] = set()
        self.lost: set[str] = set(stopped)
        self.known: set[str] = set()
        self.closed = False
        self._add(trials)

    def _add(self, trials: Iterable[Trial]) -> None:
        for trial in trials:
            if trial.name in self.finished:
                self.pretrained |= {judge_group(trial.config)}
            elif trial.name not in self.known | self.lost:  # a point may be proposed twice
                self.waiting.append(trial)
            self.known.add(trial.name)

    def close(self) -> None:
        """Give out nothing more."""
        self.closed = True

    def fill(self) -> bool:
        """Have points proposed until a trial waits. Whether one does."""
        while not self.waiting and self.proposer is not None and self.expand is not None:
            point = self.proposer.propose()
            if point is None:
                break
            try:
                trials = self.expand(point)
            except UserError as error:
                logger.warning("not run: %s", error)
                self.proposer.learn(point, None)
                continue
            self.points[str(point)] = [trial.name for trial in trials if trial.point is not None]
            self.open_points[str(point)] = point
            self._add(trials)
            self._close_points()
        return bool(self.waiting)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.closed:
            return str(Searcher.FINISHED)
        self.fill()
        for trial in self.waiting:
            if trial.needs in self.lost:
                continue  # taken out below
            if self._is_ready(trial):
                self.waiting.remove(trial)
                self.running[trial_id] = trial
                group = judge_group(trial.config)
                if group is not None and group not in self.pretrained:
                    self.pretraining[group] = trial.name
                return self.launch(trial)
        self.waiting = [trial for trial in self.waiting if trial.needs not in self.lost]
        if not self.waiting and not (self.running and self.proposer is not None):
            return str(Searcher.FINISHED)
        return None

    def _is_ready(self, trial: Trial) -> bool:
        if trial.needs is not None and trial.needs not in self.finished:
            return False
        return judge_group(trial.config) not in self.pretraining

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if result.get(JUDGE_READY):
            self._judge_is_ready(self.running[trial_id].name)

    def _judge_is_ready(self, trial: str) -> None:
        """A trial has its discriminator: those that share it may begin."""
        for group in [g for g, owner in self.pretraining.items() if owner == trial]:
            del self.pretraining[group]
            self.pretrained.add(group)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self.running.pop(trial_id)
        self._judge_is_ready(trial.name)
        reached = result.get(METRIC) if result and not error else None
        if reached is not None:
            self.scores[trial.name] = float(reached)  # of one that a scheduler stopped, too
        if reached is not None and result and result.get("status") == FINISHED:
            self.finished.add(trial.name)
        else:
            self.lost.add(trial.name)
        self._close_points()

    def _close_points(self) -> None:
        """Tell the proposer of the points all of whose trials have ended."""
        if self.proposer is None:
            return
        for key, point in list(self.open_points.items()):
            names = self.points[key]
            if all(name in self.finished or name in self.lost for name in names):
                found = [self.scores[name] for name in names if name in self.scores]
                self.proposer.learn(point, sum(found) / len(found) if found else None)
                del self.open_points[key]

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune keeps a copy to restore an experiment from, and a sweep goes on from its trials' runs."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing, for the same reason."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep goes on from the runs of its trials")


def judge_group(config: ExperimentConfig) -> str | None:
    """Trials of one group pretrain the same discriminator; None where none is pretrained.

    `judge_store` decides what is shared; this only keeps trials from making the same one side by side.
    """
    if not (config.judge.enabled and config.is_contrastive and config.judge.pretrain_steps):
        return None
    identity = config.identity()
    decides = ("task", "custom.", "data.", "teacher.", "judge.", "labels", "positives", "method", "train.seed")
    chosen = {key: value for key, value in identity.items() if key.startswith(decides)}
    return str(stable_hash(json.dumps([chosen, config.train.workers], sort_keys=True)))
