"""A sweep's own page: one file with its tables and figures, and the figures as files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.reporting.figures import PALETTE, figure, short, standalone
from qcrd_ray.reporting.html import PAGE, render
from qcrd_ray.run_folder import RunFolder
from qcrd_ray.sweeps.space import Axis, Range, Space
from qcrd_ray.sweeps.summary import PointRow, TrialRow, mean_and_interval
from qcrd_ray.sweeps.trial import FINISHED

FIGURES = "figures"


def write_page(
    folder: RunFolder,
    space: Space,
    base: ExperimentConfig,
    points: Sequence[PointRow],
    trials: Sequence[TrialRow],
    result: Mapping[str, Any],
) -> None:
    """Write `figures/*.svg` and `report.html`."""
    drawn = figures(space, trials)
    for name, svg in drawn.items():
        folder.write(f"{FIGURES}/{name}.svg", standalone(svg))
    text = render(
        "qcrd_ray.sweeps",
        "report.html.j2",
        result=result,
        axes=space.axes,
        points=points,
        trials=trials,
        figures=list(drawn.values()),
        config={key: value for key, value in base.flat().items() if key not in space.keys},
    )
    folder.write(PAGE, text)


def figures(space: Space, trials: Sequence[TrialRow]) -> dict[str, str]:
    """SVG by name: accuracy over each axis with its band, and a heat map for each two of them.

    With several axes, an axis's own figure has the mean over the others.
    """
    finished = [trial for trial in trials if trial.status == FINISHED and trial.accuracy is not None]
    drawn = {}
    for axis in space.axes:
        drawn[f"accuracy-over-{axis.name}"] = (
            _scatter(axis, finished) if isinstance(axis, Range) else _line(axis, finished)
        )
    fixed = [axis for axis in space.axes if isinstance(axis, Axis)]
    for number, first in enumerate(fixed):
        for second in fixed[number + 1 :]:
            drawn[f"heat-map-{first.name}-{second.name}"] = _heat_map(first, second, finished)
    return drawn


def _line(axis: Axis, trials: Sequence[TrialRow]) -> str:
    numbers = [choice.number for choice in axis.choices]
    is_numeric = all(number is not None for number in numbers)
    # Equal steps between choices: grids as 1, 5, 10, 20 are no even scale.
    places = list(range(len(axis.choices)))
    values = [
        [t.accuracy for t in trials if t.labels[axis.name] == choice.label and t.accuracy is not None]
        for choice in axis.choices
    ]
    with figure() as (_, plot, made):
        for place, found in zip(places, values, strict=True):
            plot.scatter([place] * len(found), found, s=14, color=PALETTE[0], alpha=0.45, linewidths=0, zorder=3)
        xs, ys, halves = [], [], []
        for place, found in zip(places, values, strict=True):
            mean, _, half = mean_and_interval(found)
            if mean is not None:
                xs.append(place)
                ys.append(mean)
                halves.append(half or 0.0)
        low, high = [y - h for y, h in zip(ys, halves, strict=True)], [y + h for y, h in zip(ys, halves, strict=True)]
        if is_numeric:
            plot.plot(xs, ys, color=PALETTE[0], marker="o", zorder=4)
            plot.fill_between(xs, low, high, color=PALETTE[0], alpha=0.18, linewidth=0)
        else:
            plot.errorbar(xs, ys, yerr=halves, color=PALETTE[0], marker="o", linestyle="none", capsize=4, zorder=4)
        plot.set_xticks(places, [short(choice.label) for choice in axis.choices])
        plot.set_xlabel(short(axis.title, 60))
        _accuracy_axis(plot, [value for found in [*values, low, high] for value in found])
        plot.margins(x=0.08)
    return made[0]


def _scatter(axis: Range, trials: Sequence[TrialRow]) -> str:
    with figure() as (_, plot, made):
        xs = [float(trial.labels[axis.name]) for trial in trials]
        plot.scatter(xs, [trial.accuracy for trial in trials], s=22, color=PALETTE[0], alpha=0.7, linewidths=0)
        if axis.log:
            plot.set_xscale("log")
        plot.set_xlabel(short(axis.title, 60))
        _accuracy_axis(plot, [trial.accuracy for trial in trials if trial.accuracy is not None])
    return made[0]


def _heat_map(first: Axis, second: Axis, trials: Sequence[TrialRow]) -> str:
    rows, columns = [c.label for c in first.choices], [c.label for c in second.choices]
    means = [
        [
            mean_and_interval(
                [
                    t.accuracy
                    for t in trials
                    if t.accuracy is not None and (t.labels[first.name], t.labels[second.name]) == (row, column)
                ]
            )[0]
            for column in columns
        ]
        for row in rows
    ]
    with figure(max(4.5, 1.1 * len(columns) + 2.2), 0.6 * len(rows) + 1.6) as (_, plot, made):
        shown = [[math.nan if value is None else value for value in line] for line in means]
        plot.imshow(shown, cmap="cividis", aspect="auto")
        plot.grid(False)
        plot.set_xticks(range(len(columns)), list(map(short, columns)))
        plot.set_yticks(range(len(rows)), list(map(short, rows)))
        plot.set_xlabel(short(second.title, 60))
        plot.set_ylabel(short(first.title, 60))
        known = [value for line in means for value in line if value is not None]
        middle = (min(known) + max(known)) / 2 if known else 0.0
        for y, line in enumerate(means):
            for x, value in enumerate(line):
                if value is not None:
                    colour = "#000000" if value > middle else "#ffffff"
                    plot.text(x, y, f"{value:.3f}", ha="center", va="center", color=colour)
    return made[0]


def _accuracy_axis(plot: Any, values: Sequence[float]) -> None:
    plot.set_ylabel("accuracy")
    if values:
        room = max(0.02, 0.15 * (max(values) - min(values)))
        plot.set_ylim(max(-0.02, min(values) - room), max(0.05, min(1.02, max(values) + room)))
