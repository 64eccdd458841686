"""`report.html`: a run, or several beside each other, as one file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcrd_ray.config import ExperimentConfig, is_infrastructure
from qcrd_ray.errors import UserError
from qcrd_ray.reporting import charts
from qcrd_ray.reporting.curves import interval
from qcrd_ray.reporting.html import PAGE, render
from qcrd_ray.reporting.questions import STUDENT, QuestionRow, pack, question_rows
from qcrd_ray.reporting.run_record import RunRecord, finite, open_run, part, read_run
from qcrd_ray.reporting.votes import agreement_rows, vote_confusion
from qcrd_ray.run_folder import RunFolder, text_file_atomic

SCRIPT, COMPARISON = "report.js", "comparison.html"
CASE_TEXT = 2_000


def make_report(paths: Sequence[str], output: Path | None = None) -> dict[str, Any]:
    """The job: write the report of one run, or of several beside each other. Returns the job's result.

    Args:
        paths: folders or URIs of runs.
        output: default: `report.html` of the run, `comparison.html` in the current folder for several.

    Raises:
        UserError: a path that is no run or that is given twice, a place that cannot be written to.
    """
    begin = time.perf_counter()
    folders = [open_run(path) for path in paths]
    for folder, count in Counter(map(str, folders)).items():
        if count > 1:
            raise UserError(f"run {folder} is given {count} times; a comparison is of different runs")
    runs = read_runs(folders)
    text = report_of(runs)
    if output is None and len(folders) == 1:
        folders[0].write(PAGE, text)
        where = folders[0].where(PAGE)
    else:
        where = str(_write(output or Path(COMPARISON), text))
    return {
        "job": "report",
        "runs": [run.where for run in runs],
        "report": where,
        "bytes": len(text.encode("utf-8")),
        "missing": {run.label: run.missing for run in runs if run.missing},
        "seconds": round(time.perf_counter() - begin, 2),
    }


def _write(path: Path, text: str) -> Path:
    path = path.expanduser()
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "lies in a folder that is not there"
        raise UserError(f"--output {path}: {what}; expected the name of a file to write")
    try:
        with text_file_atomic(path) as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written: {error.strerror}") from None
    return path


def write_report(run: RunFolder) -> None:
    """Write `report.html` of a run into its folder.

    Raises:
        UserError: the run cannot be read, or the report not be written.
    """
    run.write(PAGE, report_of([read_run(run)]))


def read_runs(folders: Sequence[RunFolder]) -> list[RunRecord]:
    """Runs with labels that tell them apart: their names, or as much of their paths as it takes."""
    paths = [str(folder).split("/") for folder in folders]
    labels, length = [folder.name for folder in folders], 1
    while length < max(map(len, paths)) and len(set(labels)) < len(labels):
        length += 1
        twice = {label for label, count in Counter(labels).items() if count > 1}
        longer = ["/".join(path[-length:]) for path in paths]
        labels = [new if old in twice else old for old, new in zip(labels, longer, strict=True)]
    return [read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]


def report_of(runs: Sequence[RunRecord]) -> str:
    """The page of one run, or of a comparison of several."""
    rows = question_rows(runs)
    packed = pack(runs, rows) if rows else None
    script = importlib.resources.files("qcrd_ray.reporting").joinpath("templates", SCRIPT).read_text(encoding="utf-8")
    densities = [charts.scores(run, len(runs) > 1) for run in runs]
    accuracy = charts.accuracy(runs)
    votes = [(run.label, agreement_rows(run), vote_confusion(run)) for run in runs]
    shown = differing(runs)
    facts = [_facts(run) for run in runs]
    return render(
        "qcrd_ray.reporting",
        "report.html.j2",
        title=runs[0].label if len(runs) == 1 else f"Comparison of {len(runs)} runs",
        runs=runs,
        facts=facts,
        unlike=_unlike(runs, facts),
        accuracy=accuracy,
        losses=charts.over_steps(runs, charts.LOSSES),
        others=charts.over_steps(runs, charts.OTHERS),
        speed=charts.over_steps(runs, charts.SPEED),
        densities=[drawing for drawing in densities if drawing is not None],
        case=_case(runs, rows),
        votes=[vote for vote in votes if vote[1] or vote[2]],
        packed=packed,
        pairs=_pairs(runs, rows),
        differing=[row for row in shown if not is_infrastructure(row.key)],
        infrastructure=[row for row in shown if is_infrastructure(row.key)],
        changed=_changed(runs[0]) if len(runs) == 1 else [],
        config={key: _written(value) for key, value in runs[0].raw_config.items()},
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
    )


# What stands in the tiles, and beside each other in a comparison


@dataclass(frozen=True)
class Facts:
    """A run in numbers; None where one is not known (yet)."""

    method: str
    task: str
    student: str
    teacher: str
    simulated: bool
    steps: int
    max_steps: int | None
    complete: bool
    before: float | None
    after: float | None
    split: str | None
    n: float | None
    low: float | None
    high: float | None
    chosen: str | None
    best: float | None
    best_step: int | None
    best_split: str | None
    tokens_per_second: float | None
    stall_fraction: float | None
    stall_seconds: float | None
    warmup_seconds: float | None
    seconds: float | None
    active_fraction: float | None
    negatives_used: int | None
    lag: str | None
    sampler_tokens_per_second: float | None


def _facts(run: RunRecord) -> Facts:
    accuracy, negatives = part(run.result, "accuracy"), part(run.result, "negatives")
    sampler = part(negatives, "sampler")
    counts, config = run.counts or {}, run.raw_config
    before, after, n = (finite(accuracy.get(key)) for key in ("before", "after", "n"))
    split = accuracy["split"] if isinstance(accuracy.get("split"), str) else None
    after = after if after is None or 0.0 <= after <= 1.0 else None
    if after is None:  # of a run under way, as far as it is evaluated
        last = next((e for e in reversed(run.evaluations) if e["step"] > 0), None)
        after, split, n = (last["accuracy"], last["split"], last["n"]) if last else (None, run.split, None)
        before = next((e["accuracy"] for e in run.evaluations if e["step"] == 0 and e["split"] == split), None)
    low, high = interval(after, int(n)) if after is not None and n else (None, None)
    seconds, waits = run.column("seconds"), run.column("wait_seconds")
    trained = float(np.nansum(seconds)) if run.step_count else 0.0
    speed = float(np.nansum(run.column("tokens"))) / trained if trained else None
    stalled = float(np.nansum(waits[1:])) if run.step_count > 1 else None
    stall_fraction = stalled / trained if stalled is not None and trained else None
    used, lags = finite(negatives.get("used")), run.column("lag")
    seen = lags[np.isfinite(lags)]
    least, most = finite(negatives.get("lag_min")), finite(negatives.get("lag_max"))
    if "lag_max" not in negatives and len(seen):
        least, most = float(seen.min()), float(seen.max())
    lag = None if least is None or most is None else f"{most:g}" if least == most else f"{least:g} to {most:g}"
    busy, sampled = finite(sampler.get("busy_seconds")), finite(sampler.get("tokens"))
    best = run.best

    def said(of: dict[str, Any] | None, key: str, otherwise: float | None) -> float | None:
        found = finite((of or {}).get(key))
        return otherwise if found is None else found

    return Facts(
        method=str(config.get("method", "?")),
        task=str(config.get("task", "?")),
        student=str(config.get("student.model", "?")),
        teacher=str(counts.get("teacher") or config.get("teacher.engine", "?")),
        simulated=bool(counts.get("simulated")),
        steps=run.step_count,
        max_steps=run.max_steps,
        complete=run.result is not None,
        before=before,
        after=after,
        split=split,
        n=n,
        low=low,
        high=high,
        chosen=accuracy.get("student"),
        best=best["accuracy"] if best else None,
        best_step=best["step"] if best else None,
        best_split=best["split"] if best else None,
        tokens_per_second=said(run.result, "train_tokens_per_second", speed),
        stall_fraction=said(negatives, "stall_fraction", stall_fraction),
        stall_seconds=said(negatives, "stall_seconds", stalled),
        warmup_seconds=said(negatives, "warmup_seconds", _first(waits)),
        seconds=said(run.result, "seconds", trained or None),
        active_fraction=said(negatives, "active_fraction", _mean(run.column("active_fraction"))),
        negatives_used=int(np.nansum(run.column("negatives"))) if used is None else int(used),
        lag=lag,
        sampler_tokens_per_second=sampled / busy if sampled is not None and busy else None,
    )


def _unlike(runs: Sequence[RunRecord], facts: Sequence[Facts]) -> str | None:
    """Why the accuracies of a comparison are not of the same questions; None where nothing says so."""
    tasks = list(dict.fromkeys(fact.task for fact in facts))
    if len(tasks) > 1:
        return f"tasks {', '.join(tasks)}"
    splits = list(dict.fromkeys(fact.split for fact in facts if fact.split))
    if len(splits) > 1:
        return f"splits {', '.join(splits)}"
    scored = list(dict.fromkeys(f"{fact.n:,.0f}" for fact in facts if fact.n is not None))
    if len(scored) > 1:
        return f"{', '.join(scored)} questions"
    asked = [run.predictions["after"].keys() for run in runs if run.predictions.get("after")]
    return "their ids differ" if any(ids != asked[0] for ids in asked[1:]) else None


def _first(values: np.ndarray) -> float | None:
    return float(values[0]) if len(values) and np.isfinite(values[0]) else None


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


# Config


@dataclass(frozen=True)
class ConfigRow:
    """A key and its value in each run, as text."""

    key: str
    values: tuple[str, ...]


def differing(runs: Sequence[RunRecord]) -> list[ConfigRow]:
    """The keys whose values differ between runs; a key that a run does not have stands as –."""
    keys = dict.fromkeys(key for run in runs for key in run.raw_config)
    rows = [ConfigRow(key, tuple(_value(run, key) for run in runs)) for key in keys]
    return [row for row in rows if len(set(row.values)) > 1]


def _changed(run: RunRecord) -> list[ConfigRow]:
    """What is not as it is by default: (value, default)."""
    default = ExperimentConfig().flat()
    rows = []
    for key, value in run.raw_config.items():
        before = _written(default[key]) if key in default else "–"
        if _written(value) != before:
            rows.append(ConfigRow(key, (_written(value), before)))
    return rows


def _value(run: RunRecord, key: str) -> str:
    return _written(run.raw_config[key]) if key in run.raw_config else "–"


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


# One question's rationales, and pairs of runs


@dataclass(frozen=True)
class CaseLine:
    """The student's rationales of a question at a temperature, (text, score) by run; None where a run has none."""

    temperature: float
    texts: tuple[tuple[str, float | None] | None, ...]


@dataclass(frozen=True)
class Case:
    """Attributes:
    place: of the question among those that have rationales of a student.
    """

    place: int
    question: str
    lines: tuple[CaseLine, ...]


def _case(runs: Sequence[RunRecord], rows: Sequence[QuestionRow]) -> Case | None:
    """The question whose rationales are shown first: one that most runs have, whose rationales differ most."""
    observed = [row for row in rows if row.of(STUDENT)]
    if not observed:
        return None

    def interest(row: QuestionRow) -> tuple[int, int, int]:
        items = row.of(STUDENT)
        return len({i.run for i in items}), len({i.text for i in items}), -max(len(i.text) for i in items)

    row = max(observed, key=interest)
    lines = []
    for temperature in sorted({i.temperature for i in row.of(STUDENT) if i.temperature is not None}):
        there = {i.run: (_cut(i.text), i.score) for i in row.of(STUDENT) if i.temperature == temperature}
        lines.append(CaseLine(temperature, tuple(there.get(number) for number in range(len(runs)))))
    return Case(observed.index(row), _cut(row.question), tuple(lines))


def _cut(text: str) -> str:
    return text if len(text) <= CASE_TEXT else f"{text[:CASE_TEXT]}… ({len(text):,} characters)"


def _have_the_same_questions(one: RunRecord, other: RunRecord) -> bool:
    texts = {row["id"]: row["question"] for row in one.held_out}
    common = [row for row in other.held_out if row["id"] in texts]
    return one.split == other.split and bool(common) and all(texts[row["id"]] == row["question"] for row in common)


@dataclass(frozen=True)
class Pair:
    """Two runs on the questions that both predicted: how many each alone has right."""

    first: str
    second: str
    both: int
    only_first: int
    only_second: int
    neither: int


def _pairs(runs: Sequence[RunRecord], rows: Sequence[QuestionRow]) -> list[Pair]:
    """The first run beside each other one: over all that both predicted, or where an id is not the same question in
    both, over those of the questions shown that are."""
    pairs = []
    for number in range(1, len(runs)):
        if _have_the_same_questions(runs[0], runs[number]):
            first, second = (run.predictions.get("after", {}) for run in (runs[0], runs[number]))
            seen = [(first[name][1], second[name][1]) for name in first if name in second]
        else:
            seen = [(row.right[0], row.right[number]) for row in rows if 0 in row.right and number in row.right]
        if seen:
            c = Counter(seen)
            pairs.append(
                Pair(runs[0].label, runs[number].label, c[True, True], c[True, False], c[False, True], c[False, False])
            )
    return pairs
