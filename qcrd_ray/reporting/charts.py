"""The figures of a report, each of one run or of several in the same axes. A run has a colour and a line style."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcrd_ray.reporting.curves import Curve, density, downsample
from qcrd_ray.reporting.figures import PALETTE, figure, short
from qcrd_ray.reporting.run_record import RunRecord

STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vP"
WIDTH, HEIGHT = 5.4, 3.0
HIGH_TEMPERATURE = 2.0
"""The second of the temperatures in the paper's figure 6."""


@dataclass(frozen=True)
class Drawing:
    """A figure: its SVG, its heading, and what it shows in words."""

    title: str
    svg: str
    says: str


@dataclass(frozen=True)
class _Panel:
    """Curves over the steps: a title, what it says, and (column of the metrics, name in a legend)."""

    title: str
    says: str
    columns: tuple[tuple[str, str], ...]
    label: str
    log: bool = False


_PANELS = (
    _Panel(
        "Loss",
        "What the student is trained on: the parts below as equation (8) weighs them, but for the discriminator's.",
        (("loss", ""),),
        "nats",
    ),
    _Panel("Label", "Cross-entropy of the label.", (("loss_label", ""),), "nats a token"),
    _Panel(
        "Positive part",
        "Chosen positives: equation (4), or with a discriminator (6), times their scores.",
        (("loss_positive", ""),),
        "nats a token",
    ),
    _Panel(
        "Negative part",
        "Chosen negatives below the margin, 0 where all are at rest: equation (5), or with a discriminator (7), times "
        "1 - score. β times it is subtracted.",
        (("loss_negative", ""),),
        "nats a token",
    ),
    _Panel("Mutual information", "Of the label and the rationale.", (("loss_mutual_information", ""),), "nats"),
    _Panel("Discriminator", "Its loss: equation (2).", (("judge_loss", ""),), "loss"),
    _Panel(
        "Scores in training",
        "The discriminator's mean scores of what was chosen; of negatives, without dropout, those inside the margin.",
        (("score_positive", "positives"), ("score_negative", "negatives")),
        "score",
    ),
    _Panel(
        "Active negatives",
        "Questions whose chosen negative is inside the margin, of those that have one.",
        (("active_fraction", ""),),
        "share",
    ),
    _Panel("Throughput", "Trained tokens a second, of each step.", (("tokens_per_second", ""),), "tokens/s"),
    _Panel(
        "Waiting for negatives",
        "Seconds that each step waited; without the first wait, which is the warm-up and counts as no stall.",
        (("wait_seconds", ""),),
        "seconds",
    ),
)
LOSSES = ("Loss", "Label", "Positive part", "Negative part", "Mutual information", "Discriminator")
OTHERS = ("Scores in training", "Active negatives")
SPEED = ("Throughput", "Waiting for negatives")


PARTS = ("loss_positive", "loss_negative")
"""Recorded as 0 at all steps where a method's loss has no such part."""


def over_steps(runs: Sequence[RunRecord], titles: Iterable[str]) -> list[Drawing]:
    """The panels of these titles for which a run has values."""
    drawings = []
    for panel in (panel for panel in _PANELS if panel.title in titles):
        found = []
        for number, run in enumerate(runs):
            for place, (column, name) in enumerate(panel.columns):
                curve = downsample(run.column("step") + 1, _values(run, column))
                if curve is not None and (column not in PARTS or np.any(curve.low != 0)):
                    found.append(
                        (number, place, " ".join(filter(None, (run.label if len(runs) > 1 else "", name))), curve)
                    )
        if found:
            drawings.append(Drawing(panel.title, _curves(found, panel.label, len(runs)), panel.says))
    return drawings


def _values(run: RunRecord, column: str) -> np.ndarray:
    if column == "wait_seconds":
        return np.where(np.arange(run.step_count) == 0, np.nan, run.column(column))
    if column != "tokens_per_second":
        return run.column(column)
    with np.errstate(divide="ignore", invalid="ignore"):
        return run.column("tokens") / run.column("seconds")


def _curves(found: Sequence[tuple[int, int, str, Curve]], label: str, runs: int) -> str:
    with figure(WIDTH, HEIGHT, fitted=False) as (_, plot, made):
        names = [name for *_, name, _ in found]
        columns = len({place for _, place, *_ in found})
        for number, place, name, curve in found:
            colour = PALETTE[(number if runs > 1 else place) % len(PALETTE)]
            style = STYLES[(number if columns == 1 else place) % len(STYLES)]
            if not curve.is_exact and len(found) <= 4:
                plot.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0)
            few = len(curve.x) <= 2
            plot.plot(
                curve.x, curve.mean, color=colour, linestyle=style, linewidth=1.5, label=short(name, 30),
                marker=MARKERS[number % len(MARKERS)] if few else None,
            )  # fmt: skip
        _step_axis(plot)
        plot.set_ylabel(label)
        plot.margins(x=0.02)
        if any(names):
            plot.legend(fontsize=8, loc="best")
    return made[0]


def _step_axis(plot: Any) -> None:
    """Named, and with whole numbers alone."""
    plot.set_xlabel("step")
    plot.xaxis.get_major_locator().set_params(integer=True)


def accuracy(runs: Sequence[RunRecord]) -> Drawing | None:
    """Accuracy over the steps with the best evaluation marked."""
    if not any(run.evaluations for run in runs):
        return None
    with figure(WIDTH, HEIGHT, fitted=False) as (_, plot, made):
        values = []
        for number, run in enumerate(runs):
            splits = [s for s in ("valid", "test") if any(e["split"] == s for e in run.evaluations)]
            for place, split in enumerate(splits):
                points = [(e["step"], e["accuracy"]) for e in run.evaluations if e["split"] == split]
                name = " ".join(filter(None, (short(run.label, 30) if len(runs) > 1 else "", split)))
                colour = PALETTE[(number if len(runs) > 1 else place) % len(PALETTE)]
                plot.plot(
                    *zip(*points, strict=True), color=colour, linestyle=STYLES[place], label=name, markersize=4,
                    marker=MARKERS[(number + number // len(PALETTE) if len(runs) > 1 else place) % len(MARKERS)],
                )  # fmt: skip
                values += [value for _, value in points]
            if (best := run.best) is not None:
                at = (best["step"], best["accuracy"])
                plot.plot(*at, marker="*", markersize=15, color=PALETTE[4], markeredgecolor="black", zorder=5)
                if len(runs) == 1:
                    plot.annotate(
                        f"best: {best['accuracy']:.3f}", at, textcoords="offset points", xytext=(-10, 6), ha="right",
                        fontsize=9,
                    )  # fmt: skip
        room = max(0.03, 0.2 * (max(values) - min(values)))
        plot.set_ylim(max(-0.02, min(values) - room), min(1.05, max(values) + room))
        _step_axis(plot)
        plot.set_ylabel("accuracy")
        plot.margins(x=0.06)
        plot.legend(fontsize=8, loc="best")
    says = "On held-out questions; the star is the best evaluation of the trained student."
    return Drawing("Over the steps", made[0], says)


@dataclass(frozen=True)
class ScoreGroup:
    """Scores that are drawn as one density, [n] float."""

    name: str
    scores: np.ndarray


def score_groups(run: RunRecord) -> tuple[list[ScoreGroup], str | None]:
    """The groups of the paper's figure 6, those that have scores; and whose questions the teacher's are of."""
    scored = [row for row in run.observed if row["score"] is not None]
    of_teacher = {row["split"] for row in scored if row["kind"] != "student"}
    split = next((s for s in (run.split, "valid", "test", "train") if s in of_teacher), None)

    def those(kind: str, where: Any = None) -> np.ndarray:
        rows = [row for row in scored if row["kind"] == kind and (where is None or where(row))]
        return np.array([row["score"] for row in rows], dtype=float)

    groups = [
        ScoreGroup("teacher, positive", those("positive", lambda row: row["split"] == split)),
        ScoreGroup("teacher, negative", those("negative", lambda row: row["split"] == split)),
    ]
    known = sorted({row["temperature"] for row in scored if row["kind"] == "student"})
    for temperature in shown_temperatures(run, known):
        rows = those("student", lambda row, t=temperature: row["temperature"] == t)
        groups.append(ScoreGroup(f"student, temperature {temperature:g}", rows))
    return [group for group in groups if len(group.scores)], split


def shown_temperatures(run: RunRecord, known: Sequence[float]) -> list[float]:
    """The two of figure 6: that of the negatives and 2.0, or the nearest that there are."""
    if len(known) <= 2:
        return list(known)
    wanted = run.temperature if run.temperature is not None else known[-2]
    low = min(known, key=lambda t: abs(t - wanted))
    rest = [t for t in known if t != low]
    return sorted((low, min(rest, key=lambda t: abs(t - HIGH_TEMPERATURE))))


def scores(run: RunRecord, titled: bool) -> Drawing | None:
    """Figure 6 of the paper; None without scores."""
    groups, split = score_groups(run)
    if not groups:
        return None
    with figure(WIDTH, HEIGHT, fitted=False) as (_, plot, made):
        for place, group in enumerate(groups):
            found = density(group.scores)
            assert found is not None
            at, heights = found
            colour = PALETTE[(2, 1, 4, 3)[place % 4]]
            plot.plot(
                at, heights, color=colour, linestyle=STYLES[place % 4], label=f"{group.name} ({len(group.scores)})"
            )
            plot.fill_between(at, 0, heights, color=colour, alpha=0.12, linewidth=0)
        plot.set_xlim(0, 1)
        plot.set_ylim(bottom=0)
        plot.set_xlabel("score of the discriminator")
        plot.set_ylabel("density")
        plot.legend(fontsize=8, loc="best")
    held_out = split is not None and split != "train"
    teachers = (
        f"The teacher's are of questions of {split}."
        if held_out
        else "The teacher's are of training questions: there are none of its samples for held-out ones."
        if split
        else "There are none of the teacher's."
    )
    students = f"The student's are of questions of {run.split}." if any("student" in g.name for g in groups) else ""
    title = f"Scores: {run.label}" if titled else "Scores of rationales"
    return Drawing(title, made[0], f"{students} {teachers}".strip())


def mean_or_none(values: Sequence[float]) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else None
