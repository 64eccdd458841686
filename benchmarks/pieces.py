"""Trials of a benchmark in files that go from machine to machine, and how their answers compare.

A sweep's folder is of one machine. What a benchmark needs of its trials is kept beside: a file a seed, with which the
same command goes on elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qcrd_ray.config import ExperimentConfig, config_from_dict, config_to_yaml
from qcrd_ray.errors import UserError
from qcrd_ray.reporting.run_record import read_predictions
from qcrd_ray.run_folder import EVALUATIONS, METRICS, RESULT, RunFolder, write_text_atomic
from qcrd_ray.seeding import stable_hash
from qcrd_ray.sweeps.driver import sweep
from qcrd_ray.sweeps.plan import Plan
from qcrd_ray.sweeps.settings import SweepSettings
from qcrd_ray.sweeps.space import Axis, Choice, Space
from qcrd_ray.sweeps.summary import mean_and_interval
from qcrd_ray.sweeps.trial import FINISHED

FLIPS = 20_000
LAST_STEPS = 100
LAST = ("loss_label", "loss_positive", "loss_negative", "active_fraction", "score_positive", "score_negative")


def shown(config: ExperimentConfig) -> ExperimentConfig:
    """Without the folders of the machine that it ran on."""
    generated = (config.data.path or "").startswith("generated:")
    data = config.data if generated else config.data.model_copy(update={"path": f"DATA/{config.task}"})
    return config.model_copy(update={"run": type(config.run)(), "data": data})


class Piece:
    """The trials of one seed that have ended well, in a file that goes from machine to machine.

    Attributes:
        base: the config of all trials.
        trials: by the labels of their choices: a sweep's row, with `settings`, `used`, `last`, `judge` and `answers`.
    """

    def __init__(self, base: ExperimentConfig, axis: Axis, seed: int, file: Path) -> None:
        self.base = base.model_copy(update={"train": base.train.model_copy(update={"seed": seed})})
        self.axis, self.seed, self.file = axis, seed, file
        self.config = config_to_yaml(shown(self.base))
        found: dict[str, Any] = {"config": self.config, "trials": []}
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
        if _as_now(found["config"]) != self.config:
            raise SystemExit(f"error: {file} is of another config; give another --pieces or remove it")
        settings = {choice.label: dict(choice.settings) for choice in axis.choices}
        labelled = {trial["labels"][axis.name]: trial for trial in found["trials"]}
        self.trials = {label: trial for label, trial in labelled.items() if trial["settings"] == settings.get(label)}

    def rows(self) -> list[dict[str, Any]]:
        """In the order of the axis."""
        return [self.trials[choice.label] for choice in self.axis.choices if choice.label in self.trials]

    def write(self) -> None:
        """A line for each trial."""
        trials = ",\n".join(json.dumps(row) for row in self.rows())
        write_text_atomic(self.file, f'{{"config": {json.dumps(self.config)},\n"trials": [\n{trials}\n]}}\n')


def _as_now(text: str) -> str:
    """A config with the keys that it was written without."""
    try:
        return config_to_yaml(config_from_dict(yaml.safe_load(text)))
    except UserError:
        return text


def all_trials(
    base: ExperimentConfig, axis: Axis, files: Mapping[int, Path], wanted: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Rows of every choice with every seed, as the seeds' `files` have them, else by sweeps, several seeds at once.

    Whatever ends a sweep, the files have the trials that had ended well.

    Args:
        wanted: labels of the choices that are run and returned, all by default; the files keep the others.
    """
    wanted = {choice.label for choice in axis.choices} if wanted is None else wanted
    pieces = {seed: Piece(base, axis, seed, file) for seed, file in files.items()}
    missing: dict[tuple[int, ...], list[Choice]] = {}
    for choice in axis.choices:
        if choice.label not in wanted:
            continue
        for seeds in _in_a_row(seed for seed, piece in pieces.items() if choice.label not in piece.trials):
            missing.setdefault(seeds, []).append(choice)
    for seeds, choices in missing.items():
        _sweep([pieces[seed] for seed in seeds], tuple(choices))
    return [row for piece in pieces.values() for row in piece.rows() if row["labels"][axis.name] in wanted]


def _in_a_row(seeds: Iterable[int]) -> list[tuple[int, ...]]:
    """Ascending numbers, as groups of which each is without a gap: what one sweep can have as seeds."""
    groups: list[tuple[int, ...]] = []
    for seed in seeds:
        if groups and groups[-1][-1] == seed - 1:
            groups[-1] = (*groups[-1], seed)
        else:
            groups.append((seed,))
    return groups


def _sweep(pieces: Sequence[Piece], choices: tuple[Choice, ...]) -> None:
    """Run choices with the pieces' seeds, which follow on each other."""
    first, axis = pieces[0], replace(pieces[0].axis, choices=choices)
    space = Space((axis,))
    # A sweep goes on with more points, yet with those alone that vary the same keys.
    name = f"{first.file.stem}-{stable_hash(*sorted(space.keys)) % 16**6:06x}"
    options = SweepSettings(name=name, seeds=len(pieces))
    plan = Plan(options, first.base, space)
    try:
        sweep(options, first.base, space)
    finally:
        rows = [row for row in plan.rows() if row.status == FINISHED]
        settings = {choice.label: dict(choice.settings) for choice in choices}
        for row in rows:
            label, run = row.labels[axis.name], plan.run(row.trial)
            pieces[row.seed - first.seed].trials[label] = vars(row) | {
                "settings": settings[label],
                "used": _used(run),
                "last": last_steps(run),
                "judge": judge_scores(run),
                "answers": _answers(run),
            }
        for piece in pieces:
            piece.write()
    failed = len(pieces) * len(choices) - len(rows)
    if failed:
        raise SystemExit(f"error: {plan.folder}: {failed} trials failed; see its outcomes.json")


def _used(run: RunFolder) -> int:
    """Questions that it was trained on."""
    result = run.read_json(RESULT)
    assert result is not None
    return int(result["data"]["train"]["used"])


def _metrics(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.read(METRICS).decode().splitlines()]


def judge_scores(run: RunFolder) -> dict[str, list[float]]:
    """The judge's mean scores of positives and of negatives: at the end of pretraining, before its online updates.

    The negatives are the minority and corrupted positives in pretraining, then those that the student is trained on.
    """
    rows = _metrics(run)
    pretrained = [row for row in rows if "judge_pretrained_steps" in row]
    updates = [row for row in rows if "judge_loss" in row]
    moments = {"pretrained": pretrained[-1:], "first": updates[:1], "last": updates[-1:]}
    prefixes = {"pretrained": "judge_pretrain"}
    return {
        moment: [row[f"{prefixes.get(moment, 'judge')}_{side}_score"] for side in ("positive", "negative")]
        for moment, found in moments.items()
        for row in found
    }


def last_steps(run: RunFolder) -> dict[str, float]:
    """Means over the last steps of training of what its metrics say."""
    rows = [row for row in _metrics(run) if "loss" in row][-LAST_STEPS:]
    values = {key: [row[key] for row in rows if row.get(key) is not None] for key in LAST}
    return {key: float(np.mean(found)) for key, found in values.items() if found}


def _answers(run: RunFolder) -> dict[str, int]:
    """1 for each question that the student that the run reports answers, 0 for the others."""
    result = run.read_json(RESULT)
    assert result is not None
    split, step = result["accuracy"]["split"], result["accuracy"]["step"]
    [number] = [e["snapshot"] for e in result["evaluations"] if (e["split"], e["step"]) == (split, step)]
    found = read_predictions(run, f"{EVALUATIONS}/{split}-{number:06d}.jsonl")
    return {key: int(correct) for key, (_, correct) in found.items()}


def p_value(p: float) -> str:
    """As a table shows it: what rounds to 0 is not 0."""
    return f"{p:.3f}" if p >= 0.0005 else "< 0.001"


def right_answers(trials: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """For each test question the share of the trials that answer it."""
    of_trials = [trial["answers"] for trial in trials]
    return {key: float(np.mean([answers[key] for answers in of_trials])) for key in of_trials[0]}


def paired(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """a - b over the same questions: its mean, half its 95 % interval, the p of flipping the signs of differences."""
    differences = np.array([a[key] - b[key] for key in sorted(a)])
    mean, _, half = mean_and_interval(differences.tolist())
    moving = differences[differences != 0.0]
    signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(FLIPS, len(moving)))
    beyond = int(np.sum(np.abs(signs @ moving) >= abs(moving.sum()) - 1e-9))
    return {"difference": mean or 0.0, "half": half or 0.0, "p": (1 + beyond) / (1 + FLIPS), "n": len(differences)}
