"""What a sweep varies: axes of choices or ranges over any keys of the config, crossed, and with seeds."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qcrd_ray.config import ExperimentConfig, config_from_dict, option_lines
from qcrd_ray.errors import UserError
from qcrd_ray.seeding import stable_hash

CHECKPOINT = "negatives.checkpoint"


@dataclass(frozen=True)
class Choice:
    """One value of an axis.

    Attributes:
        label: how it is shown.
        settings: dotted keys of the config and the values that they take.
        pretrained: settings of a run, one for each seed, whose student is `negatives.checkpoint` of this choice, unless
            the base config names one.
    """

    label: str
    settings: Mapping[str, Any]
    pretrained: Mapping[str, Any] | None = None

    @property
    def number(self) -> float | None:
        """The value, where the choice sets one key to a number."""
        values = list(self.settings.values())
        if len(values) == 1 and isinstance(values[0], int | float) and not isinstance(values[0], bool):
            return float(values[0])
        return None


@dataclass(frozen=True)
class Axis:
    """Choices for one or more keys.

    Attributes:
        name: short, as it stands in the names of trials.
        title: what it is, as it stands at a figure.
        default: label of the choice that the others are held against, where the base config is none of them.
        source: where the choices come from, for example a table of the paper.
    """

    name: str
    title: str
    choices: tuple[Choice, ...]
    default: str | None = None
    source: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(sorted({key for choice in self.choices for key in choice.settings}))


@dataclass(frozen=True)
class Range:
    """Values of one key that a searcher draws: `uniform`, `loguniform` or `randint` between two numbers, both in."""

    name: str
    title: str
    key: str
    low: float
    high: float
    log: bool = False
    integer: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    @property
    def ends(self) -> tuple[Choice, ...]:
        return (self.choice(self.low), self.choice(self.high))

    def draw(self, generator: random.Random) -> Choice:
        if self.integer:
            return self.choice(generator.randint(int(self.low), int(self.high)))
        if self.log:
            return self.choice(math.exp(generator.uniform(math.log(self.low), math.log(self.high))))
        return self.choice(generator.uniform(self.low, self.high))

    def choice(self, value: float) -> Choice:
        # Four digits are what a label can show, and what is run is what it says.
        shown = int(value) if self.integer else float(f"{min(max(value, self.low), self.high):.4g}")
        return Choice(f"{shown:g}" if not self.integer else str(shown), {self.key: shown})


@dataclass(frozen=True)
class Point:
    """One choice for each axis."""

    choices: Mapping[str, Choice]

    @property
    def settings(self) -> dict[str, Any]:
        return {key: value for choice in self.choices.values() for key, value in choice.settings.items()}

    @property
    def labels(self) -> dict[str, str]:
        return {axis: choice.label for axis, choice in self.choices.items()}

    @property
    def pretrained(self) -> Mapping[str, Any] | None:
        return next((choice.pretrained for choice in self.choices.values() if choice.pretrained), None)

    def __str__(self) -> str:
        return ", ".join(f"{axis}={label}" for axis, label in self.labels.items())


@dataclass(frozen=True)
class Space:
    """Axes, crossed."""

    axes: tuple[Axis | Range, ...] = field(default_factory=tuple)

    @property
    def ranges(self) -> list[Range]:
        return [axis for axis in self.axes if isinstance(axis, Range)]

    @property
    def keys(self) -> set[str]:
        return {key for axis in self.axes for key in axis.keys}

    def grid(self) -> list[Point]:
        """Every combination. Raises UserError where an axis is a range."""
        if self.ranges:
            key = self.ranges[0].key
            raise UserError(
                f"space {key}: a range has no grid; set searcher=random or optuna, or give a list of values"
            )
        return self.corners()

    def corners(self) -> list[Point]:
        """Every combination of the choices and of the ends of the ranges."""
        ends = [axis.choices if isinstance(axis, Axis) else axis.ends for axis in self.axes]
        names = [axis.name for axis in self.axes]
        return [Point(dict(zip(names, chosen, strict=True))) for chosen in itertools.product(*ends)]

    def draws(self, count: int, seed: int) -> list[Point]:
        """`count` points drawn at random, each axis by itself; the same for the same seed."""
        points = []
        for number in range(count):
            chosen = {}
            for axis in self.axes:
                generator = random.Random(stable_hash("space", seed, number, axis.name))
                chosen[axis.name] = axis.draw(generator) if isinstance(axis, Range) else generator.choice(axis.choices)
            points.append(Point(chosen))
        return points

    def default(self, base: ExperimentConfig) -> Point | None:
        """The point that the others are held against: the base config's own values, else what the axes call default.

        None where an axis has neither, or where the base config's value lies outside of a range.
        """
        chosen = {}
        flat = base.flat()
        for axis in self.axes:
            if isinstance(axis, Range):
                value = flat.get(axis.key)
                if not isinstance(value, int | float) or not axis.low <= value <= axis.high:
                    return None
                chosen[axis.name] = axis.choice(value)
                continue
            own = [c for c in axis.choices if all(flat.get(key) == value for key, value in c.settings.items())]
            named = [c for c in axis.choices if c.label == axis.default]
            if not own and not named:
                return None
            # A choice that sets more keys says more about the base than one that sets fewer.
            chosen[axis.name] = max(own, key=lambda c: len(c.settings)) if own else named[0]
        return Point(chosen)


def configure(base: ExperimentConfig, settings: Mapping[str, Any]) -> ExperimentConfig:
    """The base config with some keys set. Raises UserError for what does not go together."""
    raw = base.model_dump(mode="json")
    for key, value in settings.items():
        *sections, leaf = key.split(".")
        node = raw
        for section in sections:
            node = node[section]
        node[leaf] = value
    return config_from_dict(raw)


def cross(axes: Sequence[Axis | Range]) -> Space:
    """A space of these axes.

    Raises:
        UserError: none, two that set the same key, or one that sets the seed.
    """
    if not axes:
        raise UserError("no space to sweep: give --space NAME or --space key=[value, …]; see --help for the names")
    owners: dict[str, str] = {}
    for axis in axes:
        for key in axis.keys:
            if key in owners:
                raise UserError(f"space {axis.name}: {key} is set by {owners[key]} too")
            owners[key] = axis.name
            if key == "train.seed":
                raise UserError("space train.seed: every point is run with seeds=N seeds, from train.seed on")
            if key.startswith(("run.", "judge.store", "teacher.store")):
                raise UserError(f"space {key}: the sweep decides where its trials are kept")
    names = [axis.name for axis in axes]
    # Two keys may have the same last part: judge.lr and optim.lr.
    return Space(
        tuple(axis if names.count(axis.name) == 1 else replace(axis, name="+".join(axis.keys)) for axis in axes)
    )


def axis_of_key(key: str, values: Any) -> Axis | Range:
    """An axis over any key: a list of values, or {uniform | loguniform | randint: [low, high]}.

    Raises:
        UserError: an unknown key, no values, a range that is none.
    """
    kinds = {name: kind for name, kind, *_ in option_lines()}
    if key not in kinds:
        import difflib

        near = difflib.get_close_matches(key, kinds, 1, 0.4)
        hint = f"did you mean {near[0]}?" if near else "see --help for the keys"
        raise UserError(f"space {key}: unknown config key; {hint}")
    if isinstance(values, dict):
        return _range(key, values)
    if not isinstance(values, list) or not values:
        raise UserError(f"space {key}: expected a list of values or {{loguniform: [low, high]}}, found {values!r}")
    labels = [_label(value) for value in values]
    if len(set(labels)) < len(labels):
        raise UserError(f"space {key}: a value is given twice in {values!r}")
    choices = tuple(Choice(label, {key: value}) for label, value in zip(labels, values, strict=True))
    return Axis(key.rsplit(".", 1)[-1], key, choices)


def _label(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _range(key: str, values: Mapping[str, Any]) -> Range:
    kind, bounds = next(iter(values.items()), ("", None))
    known = ("uniform", "loguniform", "randint")
    is_pair = isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(b, int | float) for b in bounds)
    if kind not in known or len(values) != 1 or not is_pair:
        raise UserError(
            f"space {key}: expected {{{'|'.join(known)}: [low, high]}} or a list of values, found {dict(values)!r}"
        )
    low, high = map(float, bounds)  # type: ignore[arg-type]
    if not low < high or (kind == "loguniform" and low <= 0):
        raise UserError(
            f"space {key}: {kind} needs low < high{' and low > 0' * (kind == 'loguniform')}, got {bounds!r}"
        )
    name = key.rsplit(".", 1)[-1]
    return Range(name, key, key, low, high, kind == "loguniform", kind == "randint")


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: of its run.
        point: None for a run that only makes a student for others (`Choice.pretrained`).
        config: whole, but for `negatives.checkpoint` where `needs` says whose student that is.
        needs: name of the trial that must have ended well before.
    """

    name: str
    point: Point | None
    seed: int
    config: ExperimentConfig
    needs: str | None = None


def trials_of(base: ExperimentConfig, points: Sequence[Point], seeds: int) -> Iterator[Trial]:
    """Every point with every seed; a run that others need comes before them. Seeds go slowest.

    Raises:
        UserError: a point whose settings do not go together; the line names it.
    """
    made: set[str] = set()
    for seed in range(base.train.seed, base.train.seed + seeds):
        for point in points:
            needs = None
            settings = {**point.settings, "train.seed": seed}
            if point.pretrained is not None and base.negatives.checkpoint is None:
                first = configure(base, {**point.pretrained, "train.seed": seed})
                needs = _name(first, "pretrained", seed)
                if needs not in made:
                    made.add(needs)
                    yield Trial(needs, None, seed, first)
                settings[CHECKPOINT] = needs  # the folder is known once the sweep's is
            try:
                config = configure(base, settings)
            except UserError as error:
                raise UserError(f"point {point}: {error}") from None
            name = _name(config, "_".join(f"{axis}-{label}" for axis, label in point.labels.items()), seed)
            if name not in made:
                made.add(name)
                yield Trial(name, point, seed, config, needs)


def _name(config: ExperimentConfig, labels: str, seed: int) -> str:
    """A folder's name that says what the trial is, and that two trials never share."""
    readable = re.sub(r"[^A-Za-z0-9._+-]+", "-", labels).strip("-._+")[:80]
    return f"{readable or 'trial'}_seed-{seed}_{stable_hash(config.identity()) % 16**6:06x}"
