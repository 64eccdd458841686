"""From raw rows to questions and samples: which column holds what, and what type it must have."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError
from qcrd_ray.rationales.schema import Question

UNNAMED_TEACHER = "unnamed"

Row = Mapping[str, Any]
Place = Callable[[], str]
"""Where a row stands, for an error: made only when there is one."""

_NLI_LABELS = ("entailment", "neutral", "contradiction")
_QUESTION_COLUMNS = ("id", "question", "answer", "target", "choices", "teacher_samples")
_SAMPLE_COLUMNS = ("id", "teacher", "rationale", "answer", "target")
_COLUMN_KEYS = (*_QUESTION_COLUMNS, *(f"sample_{name}" for name in _SAMPLE_COLUMNS))
_FOREIGN_COLUMNS = {
    "id": ("id", "uid", "ID"),
    "question": ("question", "input"),
    "answer": ("answer", "label", "answerKey", "Answer"),
    "target": ("target", "equation", "Equation"),
    "choices": ("choices",),
    "teacher_samples": ("teacher_samples",),
}

_LAYOUTS = 256
"""Kinds of rows whose columns are remembered; rows that all differ must not fill the memory."""

ANSWERED, RAW, TOO_LONG, OTHER_TEACHER, WRONG = range(5)
"""How a recorded sample stands: with an answer of its own, a raw output, longer than `data.max_rationale_chars`, of a
teacher that is not asked for, not to be used (`text` says why)."""


class RecordedSample(NamedTuple):
    """A sample as it was recorded, checked, not yet parsed."""

    state: int
    text: str | None
    answer: str | None
    target: str | None
    teacher: str | None
    temperature: float | None
    seed: int | None
    finish_reason: str | None
    completion_tokens: int | None
    fingerprint: str | None
    sample_index: int | None


def nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""


def place_at(source: str, unit: str, number: int) -> Place:
    """The place of a line or a row (`unit`) of a file."""
    return lambda: place_text(source, unit, number)


def place_text(source: str, unit: str, number: int) -> str:
    return f"{source}:{number}" if unit == "line" else f"{source} row {number}"


class Columns:
    """Which column of the source holds which of ours, and what type it must have."""

    def __init__(self, config: ExperimentConfig, kind: str) -> None:
        for key in config.data.columns:
            if key not in _COLUMN_KEYS:
                hint = nearest(key, list(_COLUMN_KEYS)) or f"; known: {', '.join(_COLUMN_KEYS)}"
                raise UserError(f"config key data.columns.{key}: no column of ours{hint}")
        self._foreign = kind != "folder"
        self._candidates: dict[str, tuple[str, ...]] = {}
        for name in _QUESTION_COLUMNS:
            own = _FOREIGN_COLUMNS[name] if self._foreign else (name,)
            if config.task == "svamp" and name == "target" and not self._foreign:
                own = ("target", "equation")
            elif config.task == "svamp" and name == "target" and kind == "dss":
                own = ("target", "equation", "label")
            self._candidates[name] = (config.data.columns[name],) if name in config.data.columns else own
        for name in _SAMPLE_COLUMNS:
            key = f"sample_{name}"
            own = ("target", "equation") if config.task == "svamp" and name == "target" else (name,)
            self._candidates[key] = (config.data.columns[key],) if key in config.data.columns else own
        self._mapped = config.data.columns
        self._needs_gold = config.labels == "gold" or config.positives == "gold"
        self._is_nli = config.task in ("anli1", "esnli")
        self._teachers = config.data.teachers
        self._max_chars = config.data.max_rationale_chars
        self._layouts: dict[tuple[str, ...], dict[str, str]] = {}

    def _column(self, row: Row, name: str) -> str | None:
        return self._layout(row).get(name)

    def _layout(self, row: Row) -> dict[str, str]:
        """Our columns to the row's."""
        columns = tuple(row)
        layout = self._layouts.get(columns)
        if layout is None:
            found = {key: [c for c in candidates if c in row] for key, candidates in self._candidates.items()}
            layout = {key: there[0] for key, there in found.items() if there}
            if len(self._layouts) < _LAYOUTS:
                self._layouts[columns] = layout
        return layout

    def _missing(self, row: Row, name: str, place: Place) -> UserError:
        wanted = self._candidates[name][0]
        there = ", ".join(map(str, row)) or "none"
        ours = name.removeprefix("sample_")
        hint = "" if name in self._mapped else f"; map it: data.columns={{{name}: YOURS}}"
        hint += ", or learn from the vote: labels=teacher_vote" if name == "answer" and hint else ""
        return UserError(f"{place()}: no column {wanted!r} for {ours!r}; there are: {there}{hint}")

    def question(self, row: Row, place: Place, index: int, split: str) -> Question:
        column = self._column(row, "id")
        if column is None and (not self._foreign or "id" in self._mapped):
            raise self._missing(row, "id", place)
        identity = text_of(row[column], place, column, number=True) if column is not None else f"{split}-{index:06d}"
        if not identity:
            raise UserError(f"{place()}: column {column!r} is empty; every question needs an id")
        choices, option_of = self._choices(row, place)
        answer = self._answer(row, place)
        return Question(
            id=identity,
            question=self._question_text(row, place),
            answer=option_of.get(answer, answer) if answer is not None else None,
            target=self._optional(row, place, "target"),
            choices=choices,
        )

    def asked(self, row: Row, place: Place) -> tuple[str, tuple[str, ...] | None]:
        """A question's text and options alone. Raises UserError."""
        return self._question_text(row, place), self._choices(row, place)[0]

    def _question_text(self, row: Row, place: Place) -> str:
        column = self._column(row, "question")
        if column is not None:
            text = text_of(row[column], place, column)
            if text is None or not text.strip():
                raise UserError(f"{place()}: column {column!r} is empty; every row needs a question")
            return text
        pair = {"premise": "hypothesis", "Body": "Question"}
        for first, second in pair.items():
            if "question" not in self._mapped and first in row and second in row:
                one, two = text_of(row[first], place, first) or "", text_of(row[second], place, second) or ""
                if not (one + two).strip():
                    raise UserError(
                        f"{place()}: columns {first!r} and {second!r} are empty; every row needs a question"
                    )
                return f"premise: {one}\nhypothesis: {two}" if first == "premise" else f"{one}\n{two}"
        raise self._missing(row, "question", place)

    def _answer(self, row: Row, place: Place) -> str | None:
        column = self._column(row, "answer")
        if column is None:
            if self._column(row, "target") is None and self._needs_gold:
                raise self._missing(row, "answer", place)
            return None
        value = row[column]
        if self._is_nli and isinstance(value, int) and not isinstance(value, bool):
            return _NLI_LABELS[value] if 0 <= value < len(_NLI_LABELS) else None
        return text_of(value, place, column, number=True)

    def _optional(self, row: Row, place: Place, name: str) -> str | None:
        column = self._column(row, name)
        return None if column is None else text_of(row[column], place, column, number=True)

    def _choices(self, row: Row, place: Place) -> tuple[tuple[str, ...] | None, dict[str, str]]:
        """The options, and where they come with letters of their own (`{label: [A, …], text: […]}`) the one of each."""
        column = self._column(row, "choices")
        value = row[column] if column is not None else None
        labels: Any = []
        if isinstance(value, Mapping) and "text" in value:
            labels, value = value.get("label", []), value["text"]
        if value is None:
            return None, {}
        if isinstance(value, str) and value.startswith("["):  # a cell of a CSV
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
            raise UserError(f"{place()}: column {column!r}: expected a list of strings, found {_kind(value)}")
        choices = tuple(text_of(choice, place, str(column)) for choice in value)
        return choices, dict(zip(map(str, labels), choices, strict=False)) if isinstance(labels, list) else {}

    def samples(self, row: Row, place: Place) -> list[tuple[Place, Row]]:
        column = self._column(row, "teacher_samples")
        value = row[column] if column is not None else None
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(sample, Mapping) for sample in value):
            raise UserError(f"{place()}: column {column!r}: expected a list of objects, found {_kind(value)}")
        return [(lambda i=i: f"{place()} {column}[{i}]", sample) for i, sample in enumerate(value)]  # type: ignore[misc]

    def sample_id(self, row: Row, place: Place) -> str:
        column = self._column(row, "sample_id")
        if column is None:
            raise self._missing(row, "sample_id", place)
        identity = text_of(row[column], place, column, number=True)
        return str(identity or "")

    def sample(self, row: Row, place: Place) -> RecordedSample:
        """A sample's columns, checked. One without an `answer` column is a raw output."""
        layout = self._layout(row)
        column = layout.get("sample_teacher")
        teacher = (text_of(row[column], place, column) if column is not None else None) or UNNAMED_TEACHER
        if self._teachers is not None and teacher not in self._teachers:
            return _left_out(OTHER_TEACHER, teacher)
        column = layout.get("sample_rationale")
        if column is None:
            raise self._missing(row, "sample_rationale", place)
        text = text_of(row[column], place, column) or ""
        if len(text) > self._max_chars:
            return _left_out(TOO_LONG, teacher)
        state, answer, target = RAW, None, None
        column = layout.get("sample_answer")
        if column is not None:
            state = ANSWERED
            answer = text_of(row[column], place, column, number=True)
            column = layout.get("sample_target")
            target = None if column is None else text_of(row[column], place, column, number=True)
        return RecordedSample(
            state,
            text,
            answer,
            target,
            teacher,
            _number(row, "temperature", place, float),
            _number(row, "seed", place, int, 64),
            text_of(row.get("finish_reason"), place, "finish_reason"),
            _number(row, "completion_tokens", place, int, 32),
            text_of(row.get("fingerprint"), place, "fingerprint"),
            None,
        )


def _left_out(state: int, teacher: str) -> RecordedSample:
    return RecordedSample(state, None, None, None, teacher, None, None, None, None, None, None)


def text_of(value: Any, place: Place, column: str, number: bool = False) -> Any:
    """A text, None for null; a number becomes its text where that is allowed. Raises UserError."""
    if value is None:
        return None
    if number and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{place()}: column {column!r}: expected a string, found {_kind(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{place()}: column {column!r}: half of a surrogate pair, no valid Unicode") from None
    return value


def _number(row: Row, column: str, place: Place, kind: type[int | float], bits: int = 0) -> Any:
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise UserError(f"{place()}: column {column!r}: expected a number, found {_kind(value)}")
    if kind is int and not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
        raise UserError(f"{place()}: column {column!r}: expected a whole number of {bits} bits, found {value}")
    try:
        return kind(value)
    except OverflowError:
        raise UserError(f"{place()}: column {column!r}: expected a number, found one that is too large") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "text"}
    name = names.get(type(value), type(value).__name__)
    if isinstance(value, list):
        inner = sorted({names.get(type(item), type(item).__name__) for item in value})
        return f"{name} with {', '.join(inner)}" if inner else name
    return name
