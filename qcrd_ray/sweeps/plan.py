"""What a sweep is to run, and what of it is there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcrd_ray.config import ExperimentConfig, differing_keys
from qcrd_ray.errors import UserError
from qcrd_ray.run_folder import RESULT, STUDENT, RunFolder
from qcrd_ray.sampling.teacher import LIVE
from qcrd_ray.seeding import stable_hash
from qcrd_ray.storage import below
from qcrd_ray.sweeps.proposals import OptunaProposer, import_optuna
from qcrd_ray.sweeps.room import needs_of
from qcrd_ray.sweeps.settings import SweepSettings
from qcrd_ray.sweeps.space import CHECKPOINT, Point, Space, Trial, configure, trials_of
from qcrd_ray.sweeps.summary import TrialRow, missing_row, row_of
from qcrd_ray.sweeps.trial import FAILED, selecting_accuracy
from qcrd_ray.training.trainer import check

SWEEP, OUTCOMES = "sweep.json", "outcomes.json"
TRIALS, SAMPLES = "trials", "samples"
SHARED_STORE_SECONDS = 3600.0
"""For which a trial waits for another one that reads the teacher's samples."""


class Plan:
    """The points and trials of a sweep, and where they are kept.

    Attributes:
        points: by their names, in the order that they are reported in.
        trials: by their names, those that others need before these.
        proposer: gives further points while the sweep runs; None where all are known.
    """

    def __init__(self, settings: SweepSettings, base: ExperimentConfig, space: Space) -> None:
        """
        Raises:
            UserError: a space that the searcher cannot search, a point whose settings do not go together.
        """
        self.settings, self.base, self.space = settings, base, space
        self.folder = RunFolder(base.run.storage_path, settings.name or self._name(), base.run.storage_timeout_s)
        self.default = space.default(base)
        self.points: dict[str, Point] = {}
        self.trials: dict[str, Trial] = {}
        self.proposer: OptunaProposer | None = None
        if settings.searcher == "grid":
            self.add(space.grid())
            return
        self.add([self.default] if self.default is not None else [])  # what the others are held against
        if settings.searcher == "random":
            self.add(space.draws(settings.trials, base.train.seed))
        else:
            import_optuna()
            self.proposer = OptunaProposer(space, settings.trials, base.train.seed, self.folder)
            self.add(self.proposer.recorded())

    def add(self, points: Sequence[Point]) -> list[Trial]:
        """Take points into the sweep. Gives their trials, in order, those that others need among them."""
        self.points |= {str(point): point for point in points if str(point) not in self.points}
        trials = list(trials_of(self.base, points, self.settings.seeds))
        self.trials |= {trial.name: trial for trial in trials if trial.name not in self.trials}
        return trials

    def probes(self) -> list[Trial]:
        """Trials of the first seed that stand for all that may come: those known, and the corners of what is drawn."""
        known = [trial for trial in self.trials.values() if trial.seed == self.base.train.seed]
        drawn = trials_of(self.base, self.space.corners(), 1) if self.settings.searcher == "optuna" else []
        return [*known, *drawn]

    def configs(self) -> list[ExperimentConfig]:
        """Configs that differ in what a trial takes."""
        return list({str(needs_of(trial.config)): trial.config for trial in self.probes()}.values())

    # Where

    def _name(self) -> str:
        axes = "-".join(axis.name for axis in self.space.axes)
        return f"sweep-{self.base.task}-{axes}"[:100] + f"-{stable_hash(self.identity()) % 16**6:06x}"

    def place(self, name: str) -> str:
        """A folder of the sweep, as a storage path."""
        return below(below(self.folder.storage_path, self.folder.name), name)

    def run(self, trial: str) -> RunFolder:
        return RunFolder(self.place(TRIALS), trial, self.base.run.storage_timeout_s)

    def launched(self, trial: Trial) -> ExperimentConfig:
        """A trial's config with the places that the sweep decides."""
        own = below(self.folder.storage_path, self.folder.name)
        where: dict[str, Any] = {
            "run.storage_path": self.place(TRIALS),
            "run.name": trial.name,
            "run.resume": "auto",
            "judge.store": self.base.judge.store or own,
        }
        if trial.needs is not None:
            where[CHECKPOINT] = str(self.run(trial.needs).get_folder(STUDENT))
        if self.base.teacher.engine in LIVE and self.store is not None:
            patience_s = max(self.base.teacher.store_timeout_s, SHARED_STORE_SECONDS)
            where |= {"teacher.store": str(self.store), "teacher.store_timeout_s": patience_s}
        return configure(trial.config, where)

    @property
    def store(self) -> Path | None:
        """Where a live teacher's samples are, for all trials; None where the user must say."""
        if self.base.teacher.store is not None:
            return Path(self.base.teacher.store).expanduser().absolute()
        return self.folder.root / SAMPLES if self.folder.root is not None else None

    # What is there

    def identity(self) -> dict[str, Any]:
        """What two starts of one sweep have in common; points and seeds may be added."""
        varied = self.space.keys | {"train.seed"}
        return {key: value for key, value in self.base.identity().items() if key not in varied}

    def outcomes(self) -> dict[str, dict[str, Any]]:
        """{"status", "reason", "step", "accuracy"} of trials that ended without a result."""
        return (self.folder.read_json(OUTCOMES) if self.folder.exists() else None) or {}

    def results(self) -> dict[str, dict[str, Any]]:
        """Results of the trials that are finished."""
        runs = {name: self.run(name) for name in self.trials}
        found = {name: run.read_json(RESULT) for name, run in runs.items() if run.exists()}
        return {name: result for name, result in found.items() if result is not None}

    def finished(self) -> dict[str, float]:
        """What the trials that are finished are compared by."""
        return {name: selecting_accuracy(result) for name, result in self.results().items()}

    def rows(self) -> list[TrialRow]:
        """A row for each trial of a point, in order."""
        outcomes, results = self.outcomes(), self.results()
        rows = []
        for trial in self.trials.values():
            if trial.point is None:
                continue
            outcome = outcomes.get(trial.name, {})
            if trial.needs in outcomes and trial.needs not in results:
                outcome = {"status": FAILED, "reason": f"{trial.needs}: {outcomes[trial.needs]['reason']}"}
            result = results.get(trial.name)
            rows.append(missing_row(trial, outcome) if result is None else row_of(trial, result))
        return rows


def check_plan(plan: Plan) -> None:
    """Find what is wrong with any point before anything is started or written. Raises UserError; the line names it."""
    base, settings = plan.base, plan.settings
    if settings.scheduler != "none":
        if not base.train.eval_interval:
            raise UserError(
                f"scheduler={settings.scheduler} compares accuracies on valid while trials run; set train.eval_interval"
            )
        if "train.max_steps" in plan.space.keys:
            raise UserError(f"space train.max_steps: scheduler={settings.scheduler} compares trials of one length")
    for trial in plan.probes():
        config = trial.config
        if trial.needs is not None:  # the student that it is to take its negatives from is not there yet
            config = configure(config, {"negatives.source": "lagged", CHECKPOINT: None})
            if plan.folder.root is None:
                raise UserError(
                    f"point {trial.point}: its student is kept in {plan.folder}, and {CHECKPOINT} is a folder; "
                    f"set {CHECKPOINT}, or a run.storage_path that is a folder"
                )
        try:
            check(config, plan.run(trial.name))
        except UserError as error:
            raise UserError(f"point {trial.point}: {error}" if trial.point is not None else str(error)) from None
    if base.teacher.engine in LIVE and plan.store is None:
        raise UserError(
            f"config key teacher.store: a sweep in {plan.folder} needs a folder that all nodes see for its samples"
        )


def check_folder(plan: Plan) -> None:
    """Hold a sweep that is there against this one. Raises UserError where it is another, or is not to be there."""
    folder, resume = plan.folder, plan.base.run.resume
    before = folder.read_json(SWEEP) if folder.exists() else None
    if before is None:
        if resume == "must":
            raise UserError(f"run.resume=must, but there is no sweep at {folder}")
        return
    if resume == "never":
        raise UserError(f"sweep {folder} exists and run.resume=never; choose another name or remove the folder")
    differing = differing_keys(before, json.loads(json.dumps(plan.identity())))
    if differing:
        raise UserError(f"sweep {folder} has another config: {differing}; choose another name or remove the folder")
