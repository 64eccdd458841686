"""How far a live teacher is, on standard error, and what is reported at the end."""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.reporting.console import standard_error
from qcrd_ray.reporting.progress import clock
from qcrd_ray.run_folder import write_text_atomic
from qcrd_ray.sampling.sample_store import SampleSet
from qcrd_ray.sampling.teacher_pool import Outcome, Plan, Totals

FIRST_SECONDS, LAST_SECONDS = 2.0, 30.0
"""Seconds between two lines: few at first, so that something is seen, growing to half a minute."""
_WINDOW = 30
_IDS_SHOWN = 5


class SamplingDisplay:
    """Prints a line now and then: questions, samples, tokens a second, cost, time left."""

    def __init__(self, config: ExperimentConfig) -> None:
        self._config = config
        self._console = standard_error()
        self._begin = time.monotonic()
        self._next, self._pause = 0.0, FIRST_SECONDS
        self._announced = False
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=_WINDOW)

    def show(self, plan: Plan, totals: Totals) -> None:
        now = time.monotonic()
        if not self._announced:
            self._announced = True
            self._print(
                f"{plan.samples} samples of {plan.open_questions} questions are asked of "
                f"{self._config.teacher.model} ({self._config.teacher.engine}); {plan.reused} are there already"
            )
        self._recent.append((now, totals.answered, totals.usage.completion_tokens))
        ended = totals.answered >= plan.open_questions
        if not totals.answered or (now < self._next and not ended) or now - self._begin < FIRST_SECONDS:
            return
        self._next = now + self._pause
        self._pause = min(LAST_SECONDS, 1.5 * self._pause)
        then, answered, tokens = self._recent[0]
        seconds = max(now - then, 1e-9)
        rate = (totals.answered - answered) / seconds
        left = (plan.open_questions - totals.answered) / rate if rate else None
        parts = [
            f"questions {totals.answered}/{plan.open_questions}",
            f"samples {totals.samples}/{plan.samples}",
            f"{(totals.usage.completion_tokens - tokens) / seconds:.0f} tokens/s",
        ]
        parts += [f"{totals.failed} failed"] if totals.failed else []
        parts += [f"cost {totals.usage.cost:.4f}"] if totals.usage.cost else []
        parts += [f"{clock(left)} left"] if left is not None else []
        self._print(" · ".join(parts))

    def _print(self, text: str) -> None:
        self._console.print(f"{clock(time.monotonic() - self._begin):>7}  {escape(text)}", soft_wrap=True)


def outcome_record(config: ExperimentConfig, outcome: Outcome, sample_set: SampleSet) -> dict[str, Any]:
    """What `result.json` says of the sampling.

    `tokens_per_second` are generated tokens from the first question asked to the last one answered; starting the
    engine is apart. `cost_of_all_samples` counts earlier runs, too.
    """
    usage, total = outcome.usage, sample_set.usage()
    ids = list(dict.fromkeys(question for question, _, _ in outcome.failures))
    return {
        "engine": config.teacher.engine,
        "model": config.teacher.model,
        "fingerprint": sample_set.folder.name,
        "store": str(sample_set.folder),
        "questions": outcome.plan.questions,
        "samples_wanted": outcome.plan.samples + outcome.plan.reused,
        "reused": outcome.plan.reused,
        "sampled": outcome.sampled,
        "failed": {
            "questions": outcome.failed_questions,
            "share": outcome.failed_questions / max(1, outcome.plan.questions),
            "samples": len(outcome.failures),
            "reasons": outcome.reasons,
            "ids": ids[:_IDS_SHOWN],
        },
        "stopped": outcome.stopped,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "tokens_per_second": round(usage.completion_tokens / outcome.seconds, 1) if outcome.seconds > 0 else None,
        "seconds": round(outcome.seconds, 3),
        "engine_start_seconds": round(outcome.engine_start_seconds, 3),
        "cost": round(usage.cost, 6),
        "cost_of_all_samples": round(total.cost, 6),
    }


def sampling_table(record: dict[str, Any]) -> Table:
    """The same for a person."""
    table = Table(title=f"samples of {escape(str(record['model']))} ({record['engine']}), set {record['fingerprint']}")
    table.add_column("sampling")
    table.add_column("", justify="right")
    failed = record["failed"]
    reasons = ", ".join(f"{reason} {count}" for reason, count in failed["reasons"].items())
    speed = record["tokens_per_second"]
    rows = [
        ("samples wanted", record["samples_wanted"]),
        ("reused", record["reused"]),
        ("sampled", record["sampled"]),
        (
            "failed samples (questions)",
            f"{failed['samples']} ({failed['questions']})" + (f": {reasons}" if reasons else ""),
        ),
        ("tokens: prompt, generated", f"{record['prompt_tokens']}, {record['completion_tokens']}"),
        ("generated tokens/s", "-" if speed is None else f"{speed:.0f}"),
        ("seconds: engine start, sampling", f"{record['engine_start_seconds']:.1f}, {record['seconds']:.1f}"),
        ("cost (of all samples of the set)", f"{record['cost']:.4f} ({record['cost_of_all_samples']:.4f})"),
        *([("stopped", record["stopped"])] if record["stopped"] else []),
    ]
    for name, value in rows:
        table.add_row(name, escape(str(value)))
    return table


def write_failures(path: Path, outcome: Outcome) -> None:
    """Write what failed in this run, a JSON line for each sample; no file where nothing did."""
    lines = [
        json.dumps({"id": question, "sample_index": index, "reason": reason}, ensure_ascii=False) + "\n"
        for question, index, reason in outcome.failures
    ]
    if lines:
        write_text_atomic(path, "".join(lines))
    else:
        path.unlink(missing_ok=True)
