"""Whose rationales are better, as an LLM judges (section 5.4): two students, 50 questions, each pair in both orders.

    python jobs/judge.py --config jobs/configs/smollm2_135m.yaml task=svamp data.path=DATA/svamp \
        comparison.student_a=runs/DSS/student comparison.student_b=runs/QCRD/student \
        teacher.engine=openai teacher.model=gpt-4o-mini output=judged

The judge is the LLM of `teacher.*`, greedy. The last line of standard output is the result; `output` has every pair
with the judge's raw answers, and the same command asks for no answer twice.
"""

from __future__ import annotations

import sys
from typing import Any

from qcrd_ray.cli import job_main, write_result
from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import TooManyFailures


def run(config: ExperimentConfig) -> dict[str, Any]:
    from qcrd_ray.evaluation.comparison import compare

    failures: TooManyFailures | None = None
    try:
        result = compare(config)
    except TooManyFailures as error:
        failures, result = error, dict(error.result)
    show(result)
    write_result(str(config.output), result)
    if failures is not None:
        raise failures
    return result


def show(result: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    from qcrd_ray.reporting.console import standard_error

    title = f"{result['task']}, {result['questions']} questions, judge {result['judge']['model']}"
    table = Table(title=escape(title), caption=escape(f"A: {result['student_a']}\nB: {result['student_b']}"))
    for column in ("temperature", "A better / tie / B better", "orders differ", "no verdict", "agreement", "kappa"):
        table.add_column(column, justify="right")
    table.add_column("first place", justify="right")
    table.add_column("sign test p", justify="right")
    for one in result["comparisons"]:
        numbers = [one["agreement"], one["kappa"], one["first_place_share"], one["sign_test_p"]]
        table.add_row(
            f"{one['temperature']:g}",
            f"{one['a_better']}/{one['tie']}/{one['b_better']}",
            str(one["disagreements"]),
            str(one["unjudged"]),
            *("-" if number is None else f"{number:.2f}" for number in numbers),
        )
    standard_error().print(table)


if __name__ == "__main__":
    sys.exit(job_main("judge", __doc__ or "", run))
