"""A sweep's result on standard error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from qcrd_ray.reporting.console import standard_error


def show_result(result: Mapping[str, Any]) -> None:
    """The table of points, what was reused, and where the report is."""
    console = standard_error()
    trials, reused = result["trials"], result["reused"]
    table = Table(title=Text(f"{result['name']}: {trials['finished']} of {trials['total']} trials finished"))
    axes = list(result["axes"])
    for axis in axes:
        table.add_column(Text(axis))
    for column in ("accuracy", "std", "95 % interval", "seeds", "to the default", ""):
        table.add_column(column, justify="left" if not column else "right")
    for point in result["points"]:
        table.add_row(*(Text(point["labels"][axis]) for axis in axes), *_cells(point))
    console.print(table)
    if result["teacher_simulated"]:
        console.print("the teacher is simulated")
    console.print(
        f"asked the teacher for {reused['teacher_samples_asked']} samples, {reused['teacher_samples_reused']} reused · "
        f"{reused['judges_pretrained']} discriminators pretrained, {reused['judges_reused']} reused"
    )
    for failure in result["failures"]:
        console.print(Text(f"failed: {failure['trial']}: {failure['reason']}"), soft_wrap=True)
    console.print(Text(f"report: {result['sweep']}/report.html"), soft_wrap=True)


def _cells(point: Mapping[str, Any]) -> list[str]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    interval = "-" if point["low"] is None else f"{number(point['low'])} to {number(point['high'])}"
    difference = "-" if point["difference"] is None else f"{point['difference']:+.3f}"
    if point["difference_interval"] is not None:
        difference += f" ± {number(point['difference_interval'])}"
    noise = {True: "beyond the noise", False: "within the noise", None: ""}[point["beyond_noise"]]
    notes = ["best" * point["is_best"], "default" * point["is_default"], noise]
    notes += [f"{point[kind]} {kind}" for kind in ("failed", "stopped", "missing") if point[kind]]
    counts = [number(point["mean"]), number(point["std"]), interval, str(point["seeds"]), difference]
    return [*counts, ", ".join(note for note in notes if note)]
