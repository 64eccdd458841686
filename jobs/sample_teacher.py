"""Questions and a teacher's samples to rationale sets: read or make the samples, vote, write the tables.

    python jobs/sample_teacher.py task=svamp data.path=DATA/svamp teacher.samples=5 output=tables
    python jobs/sample_teacher.py task=svamp data.path=DATA/svamp teacher.engine=vllm teacher.model=NAME output=tables
    python jobs/sample_teacher.py task=svamp data.path=DATA/svamp teacher.engine=openai teacher.model=NAME output=tables
    python jobs/sample_teacher.py task=chain_sum data.path=generated:chain_sum teacher.engine=scripted output=tables

What is there already is not sampled again. The tables are in `output`; the last line of standard output is the result.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcrd_ray.cli import job_main, write_result
from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import TooManyFailures, UserError

if TYPE_CHECKING:
    from qcrd_ray.rationales.counts import Counts


def run(config: ExperimentConfig) -> dict[str, Any]:
    import time

    from qcrd_ray.reporting.sampling import SamplingDisplay, outcome_record, write_failures
    from qcrd_ray.sampling.teacher import failures_message, prepare_tables

    if not config.output:
        raise UserError("config key output: not set; give the folder that the tables go to")
    start = time.monotonic()
    output = Path(config.output)
    prepared = prepare_tables(config, output, show=SamplingDisplay(config).show)
    result = {
        "job": "sample_teacher",
        "task": config.task,
        "output": config.output,
        "teacher_engine": config.teacher.engine,
        "seconds": round(time.monotonic() - start, 3),
        **prepared.counts.model_dump(mode="json"),
    }
    failed = None
    if prepared.outcome is not None and prepared.sample_set is not None:
        result["sampling"] = outcome_record(config, prepared.outcome, prepared.sample_set)
        write_failures(output / "failed_samples.jsonl", prepared.outcome)
        failed = failures_message(config, prepared.outcome)
    show(prepared.counts, result.get("sampling"))
    write_result(config.output, result)
    if failed is not None:
        raise TooManyFailures(failed, result)
    return result


def show(counts: Counts, sampling: dict[str, Any] | None = None) -> None:
    from rich.table import Table

    from qcrd_ray.reporting.console import standard_error
    from qcrd_ray.reporting.sampling import sampling_table

    train = counts.train
    table = Table(title=f"{counts.task}, teacher {counts.teacher}{' (reused)' if counts.reused else ''}")
    table.add_column("training split")
    table.add_column("", justify="right")
    rows: list[tuple[str, Any]] = [
        ("questions used / read", f"{train.used} / {train.questions}"),
        *((f"dropped: {reason}", f"{drop.count} ({', '.join(drop.ids)})") for reason, drop in train.dropped.items()),
        ("samples voted (parsed, unparsed)", f"{train.samples} ({train.parsed}, {train.unparsed})"),
        ("samples left out: too long, empty, orphans", f"{train.too_long}, {train.empty}, {train.orphans}"),
        ("single-sample accuracy", train.single_sample_accuracy),
        ("vote accuracy", train.vote_accuracy),
        ("wrongly voted, yet used", train.wrongly_voted),
        ("by gold: average right", train.by_gold.average_right),
        ("by gold: share with only right", train.by_gold.only_right),
        ("by gold: share with only wrong", train.by_gold.only_wrong),
        ("by vote: average positives", train.by_vote.average_positives),
        ("by vote: share with only positives", train.by_vote.only_positives),
        ("mean agreement", train.agreement_mean),
        *((f"{split}: questions used / read", f"{c.used} / {c.questions}") for split, c in counts.held_out.items()),
    ]
    for name, value in rows:
        table.add_row(name, "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value))
    console = standard_error()
    console.print(table)
    if sampling is not None:
        console.print(sampling_table(sampling))


if __name__ == "__main__":
    sys.exit(job_main("sample_teacher", __doc__ or "", run))
