"""What the trials of a sweep say together: means over seeds, intervals, the best, and what is more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from qcrd_ray.sweeps.space import Point, Trial
from qcrd_ray.sweeps.trial import FINISHED, evaluations_on_valid

CONFIDENCE = 0.95
MISSING = "missing"


@dataclass(frozen=True)
class TrialRow:
    """One trial.

    Attributes:
        status: finished, stopped (early, by the scheduler), failed, or missing (not run to its end yet).
        reason: why it is not finished.
        accuracy, n, split: what is reported of a finished trial; else None, 0 and "".
        valid_accuracy: the best on the validation split, where there is one besides.
        step: of the student that is reported; of a stopped trial, where it was stopped.
        teacher_accuracy, vote_accuracy: share of the teacher's samples, and of their votes, that are right, of the
            training questions with a gold answer.
        teacher_sampled: samples that this trial asked the teacher for.
        judge_reused: whether its discriminator was pretrained by another trial; None without one.
    """

    trial: str
    point: str
    labels: dict[str, str]
    seed: int
    status: str
    reason: str | None = None
    accuracy: float | None = None
    accuracy_before: float | None = None
    valid_accuracy: float | None = None
    n: int = 0
    split: str = ""
    step: int = 0
    seconds: float | None = None
    teacher_simulated: bool = False
    teacher_sampled: int = 0
    teacher_reused: int = 0
    judge_reused: bool | None = None
    judge_pretrained_steps: int = 0
    negatives_used: int = 0
    active_fraction: float | None = None
    stall_fraction: float | None = None
    train_tokens_per_second: float | None = None
    teacher_accuracy: float | None = None
    vote_accuracy: float | None = None


@dataclass(frozen=True)
class PointRow:
    """One point over its seeds.

    Attributes:
        seeds: finished trials; `failed`, `stopped` and `missing` are not in the mean.
        std: sample standard deviation, None with less than two seeds.
        low, high: the interval that holds the mean with 95 % confidence (Student's t); None with less than two seeds.
        difference: to the default's mean.
        difference_interval: half the width of its 95 % interval (Welch's t); None with less than two seeds on a side.
        beyond_noise: whether the difference is larger than that; None where it is not known.
    """

    point: str
    labels: dict[str, str]
    seeds: int
    failed: int
    stopped: int
    missing: int
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    valid_mean: float | None
    is_default: bool
    is_best: bool
    difference: float | None
    difference_interval: float | None
    beyond_noise: bool | None


def missing_row(trial: Trial, outcome: Mapping[str, Any]) -> TrialRow:
    """The row of a trial that has no result; `outcome` says why, where that is known."""
    return TrialRow(
        **_named(trial),
        status=outcome.get("status", MISSING),
        reason=outcome.get("reason"),
        step=int(outcome.get("step") or 0),
        valid_accuracy=outcome.get("accuracy"),
    )


def row_of(trial: Trial, result: Mapping[str, Any]) -> TrialRow:
    """The row of a finished trial, from its run's result."""
    accuracy, judge, negatives = result["accuracy"], result["judge"], result["negatives"]
    on_valid = [float(e["accuracy"]) for e in evaluations_on_valid(result["evaluations"])]
    return TrialRow(
        **_named(trial),
        status=FINISHED,
        accuracy=accuracy["after"],
        accuracy_before=accuracy["before"],
        valid_accuracy=max(on_valid) if on_valid and accuracy["split"] != "valid" else None,
        n=accuracy["n"],
        split=accuracy["split"],
        step=accuracy["step"],
        seconds=result["seconds"],
        teacher_simulated=result["data"]["simulated"],
        teacher_sampled=result["teacher"]["sampled"],
        teacher_reused=result["teacher"]["reused"],
        judge_reused=judge["reused"] if judge["pretrained_steps"] else None,
        judge_pretrained_steps=judge["pretrained_steps"],
        negatives_used=negatives["used"],
        active_fraction=negatives["active_fraction"],
        stall_fraction=negatives["stall_fraction"],
        train_tokens_per_second=result["train_tokens_per_second"],
        teacher_accuracy=result["data"]["train"]["single_sample_accuracy"],
        vote_accuracy=result["data"]["train"]["vote_accuracy"],
    )


def _named(trial: Trial) -> dict[str, Any]:
    assert trial.point is not None
    point = trial.point
    return {"trial": trial.name, "point": str(point), "labels": point.labels, "seed": trial.seed}


def summarise(points: Sequence[Point], rows: Sequence[TrialRow], default: Point | None) -> list[PointRow]:
    """A row for each point, in their order.

    The best has the highest mean accuracy on the validation split where every finished trial has one, else on the split
    that is reported; the default, where it is as good as any other.
    """
    by_point: dict[str, list[TrialRow]] = {str(point): [] for point in points}
    for row in rows:
        by_point.setdefault(row.point, []).append(row)
    finished = {name: [row for row in found if row.status == FINISHED] for name, found in by_point.items()}
    selected = selected_by(rows)
    scores = {
        name: float(np.mean([getattr(row, selected) for row in found])) for name, found in finished.items() if found
    }
    best = max(scores, key=lambda name: (scores[name], name == str(default))) if scores else None
    held_against = [row.accuracy for row in finished.get(str(default), []) if row.accuracy is not None]
    result = []
    for point in points:
        name = str(point)
        accuracies = [row.accuracy for row in finished[name] if row.accuracy is not None]
        valid = [row.valid_accuracy for row in finished[name] if row.valid_accuracy is not None]
        mean, std, half = mean_and_interval(accuracies)
        difference, noise = (None, None) if name == str(default) else welch(accuracies, held_against)
        count = {status: sum(row.status == status for row in by_point[name]) for status in ("failed", "stopped")}
        result.append(
            PointRow(
                point=name,
                labels=point.labels,
                seeds=len(accuracies),
                **count,
                missing=len(by_point[name]) - len(accuracies) - sum(count.values()),
                mean=mean,
                std=std,
                low=None if half is None or mean is None else mean - half,
                high=None if half is None or mean is None else mean + half,
                valid_mean=float(np.mean(valid)) if valid else None,
                is_default=name == str(default),
                is_best=name == best,
                difference=difference,
                difference_interval=noise,
                beyond_noise=None if difference is None or noise is None else abs(difference) > noise,
            )
        )
    return result


def selected_by(rows: Sequence[TrialRow]) -> str:
    """The column that the best point is chosen by."""
    finished = [row for row in rows if row.status == FINISHED]
    return "valid_accuracy" if finished and all(row.valid_accuracy is not None for row in finished) else "accuracy"


def mean_and_interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Mean, sample standard deviation, and half the width of the mean's 95 % interval by Student's t."""
    from scipy.stats import t

    if not values:
        return None, None, None
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    std = float(np.std(values, ddof=1))
    return mean, std, float(t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * std / math.sqrt(len(values))


def welch(values: Sequence[float], others: Sequence[float]) -> tuple[float | None, float | None]:
    """Difference of two means, and half the width of its 95 % interval by Welch's t (variances may differ).

    The interval is None with less than two values on a side, or where neither side varies: nothing is known of the
    noise then.
    """
    from scipy.stats import ttest_ind

    if not values or not others:
        return None, None
    difference = float(np.mean(values) - np.mean(others))
    if len(values) < 2 or len(others) < 2 or np.var(values) + np.var(others) == 0.0:
        return difference, None
    interval = ttest_ind(values, others, equal_var=False).confidence_interval(CONFIDENCE)
    return difference, float(interval.high - interval.low) / 2


def trials_table(rows: Sequence[TrialRow]) -> pa.Table:
    """A column for each axis (as labels) and for each field of `TrialRow`."""
    return _table(rows, TrialRow)


def points_table(rows: Sequence[PointRow]) -> pa.Table:
    """A column for each axis (as labels) and for each field of `PointRow`."""
    return _table(rows, PointRow)


_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}


def _table(rows: Sequence[Any], kind: type) -> pa.Table:
    axes = list(dict.fromkeys(axis for row in rows for axis in row.labels))
    columns: dict[str, pa.Array] = {
        axis: pa.array([row.labels.get(axis) for row in rows], pa.string()) for axis in axes
    }
    for name, annotation in kind.__annotations__.items():
        if name != "labels":
            column = name if name not in columns else f"trial_{name}"
            columns[column] = pa.array([getattr(row, name) for row in rows], _TYPES[str(annotation).partition(" ")[0]])
    return pa.table(columns)
