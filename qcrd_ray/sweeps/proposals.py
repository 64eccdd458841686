"""Points that a searcher proposes one after the other, learning from what came of those before."""

from __future__ import annotations

import json
from typing import Any

from qcrd_ray.errors import UserError
from qcrd_ray.run_folder import RunFolder
from qcrd_ray.seeding import stable_hash
from qcrd_ray.sweeps.space import Axis, Choice, Point, Range, Space

PROPOSALS = "proposals.json"


class OptunaProposer:
    """Points as Optuna's TPE sampler proposes them; they are kept, so that a sweep that goes on proposes them again."""

    def __init__(self, space: Space, count: int, seed: int, folder: RunFolder) -> None:
        """
        Raises:
            UserError: Optuna is not installed.
        """
        self.space, self.count, self.folder = space, count, folder
        optuna = import_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.proposed: list[dict[str, Any]] = (folder.read_json(PROPOSALS) if folder.exists() else None) or []
        # What is proposed again takes nothing from the sampler's generator: with the same seed, what comes after it
        # would be the same once more.
        sampler = optuna.samplers.TPESampler(seed=stable_hash("optuna", seed, len(self.proposed)) % 2**32)
        self.study = optuna.create_study(direction="maximize", sampler=sampler)
        for parameters in self.proposed:
            self.study.enqueue_trial(parameters)
        self.asked = 0
        self.trials: dict[str, Any] = {}

    def recorded(self) -> list[Point]:
        """What was proposed in earlier starts, and will be proposed again."""
        return [
            Point({axis.name: _choice(axis, parameters[axis.name]) for axis in self.space.axes})
            for parameters in self.proposed
        ]

    def propose(self) -> Point | None:
        """The next point, None after the last."""
        if self.asked == self.count:
            return None
        trial = self.study.ask()
        chosen: dict[str, Choice] = {}
        for axis in self.space.axes:
            chosen[axis.name] = _ask(trial, axis)
        self.asked += 1
        if self.asked > len(self.proposed):
            self.proposed.append(trial.params)
            self.folder.write(PROPOSALS, json.dumps(self.proposed, indent=1) + "\n")
        point = Point(chosen)
        self.trials.setdefault(str(point), []).append(trial)
        return point

    def learn(self, point: Point, accuracy: float | None) -> None:
        """Mean accuracy of a point's seeds; None where none of them ended well."""
        optuna = import_optuna()
        for trial in self.trials.pop(str(point), []):
            if accuracy is None:
                self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                self.study.tell(trial, accuracy)


def _ask(trial: Any, axis: Axis | Range) -> Choice:
    if isinstance(axis, Axis):
        value = trial.suggest_categorical(axis.name, [choice.label for choice in axis.choices])
    elif axis.integer:
        value = trial.suggest_int(axis.name, int(axis.low), int(axis.high))
    else:
        value = trial.suggest_float(axis.name, axis.low, axis.high, log=axis.log)
    return _choice(axis, value)


def _choice(axis: Axis | Range, value: Any) -> Choice:
    if isinstance(axis, Range):
        return axis.choice(value)
    for choice in axis.choices:
        if choice.label == value:
            return choice
    raise UserError(f"space {axis.name}: {value} was proposed in an earlier start and is no choice now; add it again")


def import_optuna() -> Any:
    """The library. Raises UserError where it is missing."""
    try:
        import optuna
    except ImportError:
        raise UserError('searcher=optuna needs Optuna; pip install "qcrd_ray[optuna]"') from None
    return optuna
