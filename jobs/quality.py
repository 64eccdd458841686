"""Rationales measured without an LLM: wrong arithmetic, contradictions, copying, length, diversity.

    python jobs/quality.py task=svamp data.path=DATA/svamp evaluation.split=train output=measured
    python jobs/quality.py task=svamp data.path=DATA/svamp quality.of=both student.model=runs/NAME/student \
        quality.samples=5 quality.temperature=0.7

The last line of standard output is the result; with `output`, every rationale is written there with its measures.
"""

from __future__ import annotations

import sys
from typing import Any

from qcrd_ray.cli import job_main, write_result
from qcrd_ray.config import ExperimentConfig


def run(config: ExperimentConfig) -> dict[str, Any]:
    from qcrd_ray.evaluation.rationale_sources import measure_quality

    result = measure_quality(config)
    show(result)
    if config.output:
        write_result(config.output, result)
    return result


NAMES = {
    "words": "words",
    "tokens": "tokens",
    "cut": "cut at the limit of tokens",
    "right": "label is the gold answer",
    "with_steps": "states arithmetic",
    "wrong_steps": "arithmetic steps that are wrong",
    "with_wrong_steps": "of those with steps, a wrong one",
    "states_answer": "names its answer itself",
    "contradicts": "of those, contradicts its label",
    "copied_share": "n-grams that the question has",
    "longest_copied": "longest copied run, tokens",
    "distinct_1": "distinct-1 of a question's samples",
    "distinct_2": "distinct-2",
    "similarity": "similarity of two samples",
    "duplicates": "samples that are duplicates",
}
GROUPS = ("all", "right", "wrong")


def show(result: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from qcrd_ray.reporting.console import standard_error

    console = standard_error()
    for writer, groups in result["writers"].items():
        table = Table(title=escape(f"{result['task']} {result['split']}, {writer}"))
        table.add_column("mean or share (95 %)")
        for group in GROUPS:
            name = group if group == "all" else f"{group} label"
            table.add_column(f"{name}\n{groups[group]['rationales']} rationales", justify="right")
        for name, shown in NAMES.items():
            found = [groups[group]["measures"].get(name) for group in GROUPS]
            if any(found):
                table.add_row(shown, *map(_shown, found))
        console.print(table)


def _shown(measure: dict[str, Any] | None) -> str:
    if measure is None:
        return "-"
    digits = 1 if measure["value"] >= 2 else 3
    text = f"{measure['value']:.{digits}f}"
    if measure["low"] is not None:
        text += f" ({measure['low']:.{digits}f}-{measure['high']:.{digits}f})"
    return text


if __name__ == "__main__":
    sys.exit(job_main("quality", __doc__ or "", run))
