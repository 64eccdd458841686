"""The table of questions that a report carries: built column by column here, packed, drawn by report.js."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qcrd_ray.reporting.charts import mean_or_none, shown_temperatures
from qcrd_ray.reporting.run_record import RunRecord

MOST_BYTES = 7_000_000
"""Of the packed table in the page; what is larger is cut."""
CUTS = (None, 4_000, 1_000, 400, 150)
KINDS = ("positive", "negative", "sampled negative", "student", "prediction before training", "prediction")
POSITIVE, NEGATIVE, SAMPLED, STUDENT, BEFORE, AFTER = range(len(KINDS))
_OBSERVED = {"positive": POSITIVE, "negative": NEGATIVE, "student": STUDENT}


@dataclass(frozen=True)
class Item:
    """A text that belongs to a question."""

    run: int
    kind: int
    temperature: float | None
    text: str
    score: float | None = None


@dataclass
class QuestionRow:
    """A question with what all runs have of it.

    Attributes:
        labels, agreement, votes_gold: by run.
        right: by run, whether the trained student's prediction is.
    """

    split: str
    id: str
    question: str
    labels: dict[int, str] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)
    agreement: dict[int, float] = field(default_factory=dict)
    votes_gold: dict[int, bool] = field(default_factory=dict)
    right: dict[int, bool] = field(default_factory=dict)

    def of(self, *kinds: int) -> list[Item]:
        return [item for item in self.items if item.kind in kinds]


def question_rows(runs: Sequence[RunRecord]) -> list[QuestionRow]:
    """Held-out questions, then training questions, each once for all runs that have it."""
    rows: dict[tuple[str, str, str], QuestionRow] = {}

    def row_of(number: int, split: str, record: dict[str, Any]) -> QuestionRow:
        text = record["question"].strip()
        if record["choices"]:
            text += "\nAnswer Choices: " + ", ".join(record["choices"])
        key = (split, record["id"], text)
        row = rows.setdefault(key, QuestionRow(split, record["id"], text))
        row.labels[number] = record["label"]
        return row

    for number, run in enumerate(runs):
        observed = _observed_of(run)
        for record in run.held_out:
            row = row_of(number, run.split or "", record)
            for name, kind in (("before", BEFORE), ("after", AFTER)):
                if (found := run.predictions.get(name, {}).get(record["id"])) is not None:
                    row.items.append(Item(number, kind, None, found[0]))
                    if name == "after":
                        row.right[number] = found[1]
            for seen in observed.get((run.split, record["id"]), ()):
                row.items.append(_item(number, seen))
    for number, run in enumerate(runs):
        observed = _observed_of(run)
        for record in run.train:
            row = row_of(number, "train", record)
            for of_run, value in ((row.agreement, record["agreement"]), (row.votes_gold, record["votes_gold"])):
                if value is not None:
                    of_run[number] = value
            scores = {(o["kind"], o["rationale"]): o["score"] for o in observed.get(("train", record["id"]), ())}
            for kind, name in ((POSITIVE, "positives"), (NEGATIVE, "negatives")):
                for text in record[name]:
                    row.items.append(Item(number, kind, None, text, scores.get((KINDS[kind], text))))
            for negative in run.negatives.get(record["id"], ()):
                row.items.append(Item(number, SAMPLED, run.temperature, negative["rationale"]))
    return list(rows.values())


def _observed_of(run: RunRecord) -> dict[tuple[str | None, str], list[dict[str, Any]]]:
    found: dict[tuple[str | None, str], list[dict[str, Any]]] = {}
    for row in run.observed:
        found.setdefault((row["split"], row["id"]), []).append(row)
    return found


def _item(number: int, seen: dict[str, Any]) -> Item:
    temperature = None if seen["temperature"] is None else round(seen["temperature"], 4)
    return Item(number, _OBSERVED.get(seen["kind"], STUDENT), temperature, seen["rationale"], seen["score"])


@dataclass(frozen=True)
class PackedTable:
    """
    Attributes:
        data: gzip of JSON, as base64: letters, digits, `+`, `/` and `=` only.
        note: what was left out, None where all is there.
    """

    data: str
    rows: int
    note: str | None


def pack(runs: Sequence[RunRecord], rows: Sequence[QuestionRow], most_bytes: int = MOST_BYTES) -> PackedTable:
    """The table as the page holds it. Long texts are cut, then questions left out, until it is small enough."""
    data, cut, shown = "", None, list(rows)
    for cut in CUTS:
        data = _packed(runs, shown, cut)
        if len(data) <= most_bytes:
            break
    while len(data) > most_bytes and len(shown) > 1:
        shown = shown[: len(shown) // 2]
        data = _packed(runs, shown, cut)
    notes = [f"{len(shown):,} of {len(rows):,} questions"] if len(shown) < len(rows) else []
    notes += [f"no text beyond {cut:,} characters"] if cut is not None else []
    note = f"To keep the file small it holds {' and '.join(notes)}." if notes else None
    return PackedTable(data, len(shown), note)


def _packed(runs: Sequence[RunRecord], rows: Sequence[QuestionRow], cut: int | None) -> str:
    places: dict[str, int] = {}

    def text(value: str) -> int:
        # A lone surrogate has no UTF-8.
        value = value.encode("utf-8", "replace").decode("utf-8")
        return places.setdefault(value if cut is None or len(value) <= cut else value[:cut] + " […]", len(places))

    columns, values = _columns(runs, rows)
    items = [
        [
            [i.run, i.kind, i.temperature, text(i.text), None if i.score is None else round(i.score, 4)]
            for i in row.items
        ]
        for row in rows
    ]
    heads = [[row.split, row.id, text(row.question)] for row in rows]
    table = {
        "runs": [run.label for run in runs],
        "kinds": KINDS,
        "columns": columns,
        "rows": [[*head, v, i] for head, v, i in zip(heads, values, items, strict=True)],
        "texts": list(places),
    }
    content = json.dumps(table, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(content.encode("utf-8"), 6, mtime=0)).decode("ascii")


def _columns(runs: Sequence[RunRecord], rows: Sequence[QuestionRow]) -> tuple[list[dict[str, str]], list[list[Any]]]:
    """Titles and kinds (`text`, `number`, `whole`, `verdict`) of the columns after the question; values by row."""
    if len(runs) > 1:
        return _compared(runs, rows)
    columns = [
        {"title": "Label", "kind": "text"},
        {"title": "Prediction right", "kind": "verdict"},
        {"title": "Agreement", "kind": "number"},
        {"title": "Vote is gold", "kind": "verdict"},
        {"title": "Positives", "kind": "whole"},
        {"title": "Negatives", "kind": "whole"},
        {"title": "Score of positives", "kind": "number"},
        {"title": "Score of negatives", "kind": "number"},
        {"title": "Score of the student", "kind": "number"},
    ]
    values = []
    temperatures = sorted({i.temperature for row in rows for i in row.of(STUDENT) if i.temperature is not None})
    shown = runs[0].temperature
    if shown not in temperatures and temperatures:
        shown = shown_temperatures(runs[0], temperatures)[0]
    for row in rows:
        positives, negatives = row.of(POSITIVE), row.of(NEGATIVE, SAMPLED)
        values.append([
            row.labels.get(0),
            _bool(row.right.get(0)),
            _round(row.agreement.get(0)),
            _bool(row.votes_gold.get(0)),
            len(positives),
            len(negatives),
            _mean_score(positives),
            _mean_score(row.of(NEGATIVE)),
            _mean_score([item for item in row.of(STUDENT) if item.temperature == shown]),
        ])  # fmt: skip
    return columns, values


def _compared(runs: Sequence[RunRecord], rows: Sequence[QuestionRow]) -> tuple[list[dict[str, str]], list[list[Any]]]:
    """The columns of a comparison. What is the same in all runs has one, else there is one for each run."""
    everywhere = range(len(runs))
    columns: list[dict[str, str]] = []
    values: list[list[Any]] = [[] for _ in rows]

    def add(title: str, kind: str, found: Sequence[Mapping[int, Any]], apart: bool) -> None:
        apart = apart or any(len(set(of_runs.values())) > 1 for of_runs in found)
        columns.extend(
            {"title": f"{title}: {runs[n].label}" if apart else title, "kind": kind}
            for n in (everywhere if apart else [0])
        )
        for row, of_runs in zip(values, found, strict=True):
            row += [of_runs.get(n) for n in everywhere] if apart else [next(iter(of_runs.values()), None)]

    add("Label", "text", [row.labels for row in rows], apart=False)
    add("Right", "verdict", [{n: int(right) for n, right in row.right.items()} for row in rows], apart=True)
    add("Agreement", "number", [{n: _round(a) for n, a in row.agreement.items()} for row in rows], apart=False)
    return columns, values


def _mean_score(items: Sequence[Item]) -> float | None:
    return _round(mean_or_none([item.score for item in items if item.score is not None]))


def _bool(value: bool | None) -> int | None:
    return None if value is None else int(value)


def _round(value: float | None) -> float | None:
    return None if value is None else round(float(value), 4)
