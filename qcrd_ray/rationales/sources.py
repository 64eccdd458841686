"""Readers: questions and recorded teacher samples, from the files that people have.

Whatever the layout, a reader gives `QUESTIONS_WITH_SAMPLES` batches in the order of the source and holds no more than
one batch, one file of a Distilling-step-by-step teacher, and a hash of each id.

* A folder with train, valid and perhaps test as .jsonl or .parquet. Samples are nested in each question
  (`teacher_samples`) or flat in `train.teacher_samples.jsonl|parquet`.
* A Distilling-step-by-step folder: `NAME_train.json`, `llm/train_CoT_0.json` and so on, raw outputs of PaLM.
* `hub:NAME` or `hub:NAME:CONFIGURATION`, a data set for Hugging Face's `datasets`.
* `generated:TASK`, questions that the task makes itself; they have no recorded samples.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError
from qcrd_ray.rationales.schema import QUESTIONS_WITH_SAMPLES, Question, TeacherSample
from qcrd_ray.rationales.self_consistency import order_samples
from qcrd_ray.seeding import stable_hash
from qcrd_ray.tasks import Task

SPLITS = ("train", "valid", "test")
BATCH_ROWS = 256
UNNAMED_TEACHER = "unnamed"
DSS_TEACHER = "palm540b"

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


@dataclass(frozen=True)
class SourceRow:
    """A question and its samples, in voting order.

    Attributes:
        too_long: samples left out because they exceed `data.max_rationale_chars`.
        empty: samples left out because no rationale stands in them.
        orphans: on the last row, samples of a flat table that belong to no question.
    """

    question: Question
    samples: tuple[TeacherSample, ...] = ()
    too_long: int = 0
    empty: int = 0
    orphans: int = 0


def splits_available(config: ExperimentConfig) -> tuple[str, ...]:
    """Which of train, valid and test the source has. Raises UserError for a source that is not there."""
    kind, location = _source(config)
    if kind == "generated":
        return tuple(split for split in SPLITS if config.data.generated.get(split))
    if kind == "hub":
        names = _hub_splits(location)
        return tuple(split for split in SPLITS if _hub_split(names, split))
    return tuple(split for split in SPLITS if _question_file(kind, Path(location), split) is not None)


def read_split(config: ExperimentConfig, task: Task, split: str, samples: bool = True) -> Iterator[pa.RecordBatch]:
    """`QUESTIONS_WITH_SAMPLES` batches of a split, in the order of the source.

    Args:
        samples: False leaves the recorded samples out (held-out splits, live teachers).

    Raises:
        UserError: as the batches are drawn, at the first thing that the user must mend.
    """
    rows: list[dict[str, Any]] = []
    try:
        for row in read_rows(config, task, split, samples):
            rows.append(_arrow_row(row))
            if len(rows) == BATCH_ROWS:
                yield pa.RecordBatch.from_pylist(rows, schema=QUESTIONS_WITH_SAMPLES)
                rows = []
    except UserError:
        if rows:
            yield pa.RecordBatch.from_pylist(rows, schema=QUESTIONS_WITH_SAMPLES)
        raise
    if rows:
        yield pa.RecordBatch.from_pylist(rows, schema=QUESTIONS_WITH_SAMPLES)


def read_split_with_error_row(
    config: ExperimentConfig, task: Task, split: str, samples: bool = True
) -> Iterator[pa.RecordBatch]:
    """As `read_split`, but what the user must mend comes as a last row with `error`.

    A pipeline that reads ahead would raise an error of row 5000 sooner or later than its consumer sees row 10; in the
    stream, it is met in order.
    """
    try:
        yield from read_split(config, task, split, samples)
    except UserError as error:
        row = _arrow_row(SourceRow(Question("", "")), str(error))
        yield pa.RecordBatch.from_pylist([row], schema=QUESTIONS_WITH_SAMPLES)


def read_rows(config: ExperimentConfig, task: Task, split: str, samples: bool = True) -> Iterator[SourceRow]:
    """The rows of a split, one by one; see `read_split`."""
    kind, location = _source(config)
    if kind == "generated":
        yield from _generated_rows(config, task, split, location)
        return
    columns = _Columns(config, kind)
    seen: dict[int, int] = {}
    known_teachers: set[str] = set()
    last: SourceRow | None = None
    name = str(_question_file(kind, Path(location), split) or location) if kind != "hub" else config.data.path
    with _FlatSamples(config, columns, kind, Path(location), split if samples else None) as flat:
        for index, (place, row) in enumerate(_raw_rows(config, kind, location, split)):
            question = columns.question(row, place, index, split)
            identity = stable_hash(question.id)
            if identity in seen:
                first = _place_of(kind, name, seen[identity])
                raise UserError(f"{place()}: id {question.id!r} stands twice, first at {first}")
            seen[identity] = _number_of(place)
            if not samples:
                yield SourceRow(question)
                continue
            if last is not None:
                yield last
            recorded = flat.of(question.id) if flat.path else columns.samples(row, place)
            last = _with_samples(config, task, columns, question, recorded, known_teachers)
            if flat.path is None:
                yield last
                last = None
        if last is not None:
            yield dataclasses.replace(last, orphans=flat.orphans(seen))
    if not seen:
        raise UserError(f"{name}: the split {split!r} is empty")
    unknown = sorted(set(config.data.teachers or ()) - known_teachers) if samples else []
    if unknown:
        there = ", ".join(sorted(known_teachers)) or "none: no question has teacher samples"
        raise UserError(f"config key data.teachers: no samples of {', '.join(map(repr, unknown))}; known: {there}")


def check_teachers(config: ExperimentConfig, task: Task, split: str) -> None:
    """Read a split to its end for the names of its teachers. Raises UserError for an unknown `data.teachers`."""
    for _ in read_rows(config, task, split):
        pass


def source_fingerprint(config: ExperimentConfig) -> str:
    """A hash of the content of all files that the source reads; of its name, where it reads none."""
    kind, location = _source(config)
    digest = hashlib.sha256(f"{kind}:{location}".encode() if kind in ("hub", "generated") else kind.encode())
    if kind not in ("hub", "generated"):
        folder = Path(location)
        files = [_question_file(kind, folder, split) for split in SPLITS]
        files += [_find_file(folder, f"{split}.teacher_samples") for split in SPLITS]
        files += sorted(folder.glob("llm/*_CoT_*.json")) if kind == "dss" else []
        for path in files:
            if path is not None:
                with path.open("rb") as file:
                    digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# Where the source is.


def _source(config: ExperimentConfig) -> tuple[str, str]:
    """(kind, location): generated, hub, dss or folder."""
    path = config.data.path
    if not path:
        raise UserError(
            "config key data.path: not set; give a folder with train.jsonl and valid.jsonl (or .parquet), "
            "hub:NAME or generated:chain_sum"
        )
    for kind in ("generated", "hub"):
        if path.startswith(f"{kind}:"):
            return kind, path.removeprefix(f"{kind}:")
    folder = Path(path).expanduser()
    if not folder.exists():
        siblings = [str(sibling) for sibling in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(f"config key data.path: {folder} not found{_nearest(str(folder), siblings)}")
    if not folder.is_dir():
        raise UserError(f"config key data.path: {folder} is a file; give the folder that holds it")
    if _find_file(folder, "train") is None and any(folder.glob("*_train.json")):
        return "dss", str(folder)
    return "folder", str(folder)


def _find_file(folder: Path, stem: str) -> Path | None:
    found = [path for suffix in (".jsonl", ".parquet") if (path := folder / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        raise UserError(f"{folder}: both {found[0].name} and {found[1].name} are there; keep one")
    return found[0] if found else None


def _question_file(kind: str, folder: Path, split: str) -> Path | None:
    if kind == "dss":
        name = _dss_name(folder)
        path = folder / f"{name}_{split}.json"
        return path if path.is_file() else None
    return _find_file(folder, split)


def _dss_name(folder: Path) -> str:
    names = sorted(path.name.removesuffix("_train.json") for path in folder.glob("*_train.json"))
    if len(names) > 1:
        raise UserError(f"{folder}: several data sets in one folder: {', '.join(names)}; keep one")
    return names[0]


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""


# Raw rows of each layout.


def _raw_rows(config: ExperimentConfig, kind: str, location: str, split: str) -> Iterator[tuple[Place, Row]]:
    if kind == "hub":
        yield from _hub_rows(config, location, split)
        return
    folder = Path(location)
    path = _question_file(kind, folder, split)
    if path is None:
        there = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
        near = _nearest(f"{split}.jsonl", there)
        raise UserError(
            f"{folder}: no {split}.jsonl or {split}.parquet{near or '; there are: ' + (', '.join(there) or 'no files')}"
        )
    if kind == "dss":
        yield from _dss_rows(path, folder, split)
    else:
        yield from _file_rows(path)


def _file_rows(path: Path) -> Iterator[tuple[Place, Row]]:
    return _parquet_rows(path) if path.suffix == ".parquet" else _json_lines(path)


def _json_lines(path: Path) -> Iterator[tuple[Place, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = _place(path, "line", number)
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                raise UserError(f"{place()}: no valid UTF-8") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{place()}: no valid JSON: {error.msg} (column {error.colno})") from None
            except RecursionError:
                raise UserError(f"{place()}: no valid JSON: nested too deep") from None
            if not isinstance(row, dict):
                raise UserError(f"{place()}: expected a JSON object, found {type(row).__name__}")
            yield place, row


def _parquet_rows(path: Path) -> Iterator[tuple[Place, Row]]:
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield _place(path, "row", number), row
    except pa.ArrowException as error:
        raise UserError(f"{path}: no valid Parquet: {error}") from None


def _dss_rows(path: Path, folder: Path, split: str) -> Iterator[tuple[Place, Row]]:
    outputs = _dss_outputs(folder, split)
    for place, row in _json_lines(path):
        output = next(outputs, None)
        if output is None:
            yield place, row
        else:
            yield place, {**row, "teacher_samples": [{"teacher": DSS_TEACHER, "rationale": output}]}
    if next(outputs, None) is not None:
        raise UserError(f"{folder}/llm: more outputs of the teacher for {split!r} than questions in {path.name}")


def _dss_outputs(folder: Path, split: str) -> Iterator[str]:
    numbered = re.compile(rf"{split}_CoT_(\d+)\.json")
    found = {int(m[1]): p for p in folder.glob(f"llm/{split}_CoT_*.json") if (m := numbered.fullmatch(p.name))}
    for expected, number in enumerate(sorted(found)):
        if number != expected:
            raise UserError(f"{folder}/llm: no {split}_CoT_{expected}.json, but {found[number].name} is there")
        try:
            outputs = json.loads(found[number].read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{found[number]}: no valid JSON: {error}") from None
        if not isinstance(outputs, list) or not all(isinstance(output, str) for output in outputs):
            raise UserError(f"{found[number]}: expected a JSON list of strings")
        yield from outputs


def _generated_rows(config: ExperimentConfig, task: Task, split: str, family: str) -> Iterator[SourceRow]:
    generate = getattr(task, "generate_questions", None)
    if generate is None or family != task.name:
        raise UserError(f"config key data.path: generated:{family} does not go with task={task.name}")
    count = config.data.generated.get(split)
    if not count:
        raise UserError(f"config key data.generated: no split {split!r}; there are: {', '.join(config.data.generated)}")
    for question in generate(split, count, config.teacher.seed):
        yield SourceRow(
            Question(
                id=question.id,
                question=question.question,
                answer=question.answer,
                target=getattr(question, "target", None),
                choices=getattr(question, "choices", None),
            )
        )


def _hub_library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("config key data.path: hub:… needs the package datasets: pip install 'qcrd_ray[hub]'") from None
    return datasets


def _hub_name(location: str) -> tuple[str, str | None]:
    name, _, configuration = location.partition(":")
    return name, configuration or None


def _hub_splits(location: str) -> list[str]:
    library = _hub_library()
    name, configuration = _hub_name(location)
    try:
        return list(library.get_dataset_split_names(name, configuration))
    except (OSError, ValueError, RuntimeError, LookupError, library.exceptions.DatasetsError) as error:
        raise UserError(f"config key data.path: hub:{location} cannot be read: {error}") from None


def _hub_split(names: list[str], split: str) -> str | None:
    aliases = {"valid": ("valid", "validation", "dev")}.get(split, (split,))
    return next((name for alias in aliases for name in (alias, f"{alias}_r1") if name in names), None)


def _hub_rows(config: ExperimentConfig, location: str, split: str) -> Iterator[tuple[Place, Row]]:
    names = _hub_splits(location)
    theirs = _hub_split(names, split)
    if theirs is None:
        raise UserError(f"hub:{location}: no split {split!r}; there are: {', '.join(names)}")
    library = _hub_library()
    name, configuration = _hub_name(location)
    try:
        data = library.load_dataset(name, configuration, split=theirs)
    except (OSError, ValueError, RuntimeError, LookupError, library.exceptions.DatasetsError) as error:
        raise UserError(f"config key data.path: hub:{location} cannot be read: {error}") from None
    words = {c: f.int2str for c, f in data.features.items() if type(f).__name__ == "ClassLabel"}
    for number, row in enumerate(data, start=1):
        named = {c: words[c](v) if c in words and isinstance(v, int) and v >= 0 else v for c, v in row.items()}
        yield _place(f"hub:{location} {theirs}", "row", number), named


def _place(path: Path | str, unit: str, number: int) -> Place:
    def place() -> str:
        return f"{path}:{number}" if unit == "line" else f"{path} row {number}"

    place.number = number  # type: ignore[attr-defined]
    return place


def _number_of(place: Place) -> int:
    return int(place.number)  # type: ignore[attr-defined]


def _place_of(kind: str, name: str | None, number: int) -> str:
    return f"line {number}" if kind == "dss" or str(name).endswith(".jsonl") else f"row {number}"


# From raw rows to questions and samples.


class _Columns:
    """Which column of the source holds which of ours, and what type it must have."""

    def __init__(self, config: ExperimentConfig, kind: str) -> None:
        for key in config.data.columns:
            if key not in _COLUMN_KEYS:
                hint = _nearest(key, list(_COLUMN_KEYS)) or f"; known: {', '.join(_COLUMN_KEYS)}"
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
        self._is_nli = config.task in ("anli1", "esnli")

    def _column(self, row: Row, name: str) -> str | None:
        return next((column for column in self._candidates[name] if column in row), None)

    def _missing(self, row: Row, name: str, place: Place) -> UserError:
        wanted = self._candidates[name][0]
        there = ", ".join(map(str, row)) or "none"
        ours = name.removeprefix("sample_")
        hint = "" if name in self._mapped else f"; map it: data.columns={{{name}: YOURS}}"
        return UserError(f"{place()}: no column {wanted!r} for {ours!r}; there are: {there}{hint}")

    def question(self, row: Row, place: Place, index: int, split: str) -> Question:
        column = self._column(row, "id")
        if column is None and (not self._foreign or "id" in self._mapped):
            raise self._missing(row, "id", place)
        identity = _text(row[column], place, column, number=True) if column is not None else f"{split}-{index:06d}"
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

    def _question_text(self, row: Row, place: Place) -> str:
        column = self._column(row, "question")
        if column is not None:
            text = _text(row[column], place, column)
            if text is None or not text.strip():
                raise UserError(f"{place()}: column {column!r} is empty; every row needs a question")
            return text
        pair = {"premise": "hypothesis", "Body": "Question"}
        for first, second in pair.items():
            if "question" not in self._mapped and first in row and second in row:
                one, two = _text(row[first], place, first) or "", _text(row[second], place, second) or ""
                return f"premise: {one}\nhypothesis: {two}" if first == "premise" else f"{one}\n{two}"
        raise self._missing(row, "question", place)

    def _answer(self, row: Row, place: Place) -> str | None:
        column = self._column(row, "answer")
        if column is None:
            if self._column(row, "target") is None:
                raise self._missing(row, "answer", place)
            return None
        value = row[column]
        if self._is_nli and isinstance(value, int) and not isinstance(value, bool):
            return _NLI_LABELS[value] if 0 <= value < len(_NLI_LABELS) else None
        return _text(value, place, column, number=True)

    def _optional(self, row: Row, place: Place, name: str) -> str | None:
        column = self._column(row, name)
        return None if column is None else _text(row[column], place, column, number=True)

    def _choices(self, row: Row, place: Place) -> tuple[tuple[str, ...] | None, dict[str, str]]:
        """The options, and where they come with letters of their own (`{label: [A, …], text: […]}`) the one of each."""
        column = self._column(row, "choices")
        value = row[column] if column is not None else None
        labels: Any = []
        if isinstance(value, Mapping) and "text" in value:
            labels, value = value.get("label", []), value["text"]
        if value is None:
            return None, {}
        if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
            raise UserError(f"{place()}: column {column!r}: expected a list of strings, found {_kind(value)}")
        choices = tuple(_text(choice, place, str(column)) for choice in value)
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
        identity = _text(row[column], place, column, number=True)
        return str(identity or "")

    def teacher(self, row: Row, place: Place) -> str:
        column = self._column(row, "sample_teacher")
        return (_text(row[column], place, column) if column is not None else None) or UNNAMED_TEACHER

    def sample(self, row: Row, place: Place, task: Task, question: Question, max_chars: int) -> TeacherSample | None:
        """The sample, or None where it is longer than `max_chars`. One without an `answer` column is a raw output."""
        column = self._column(row, "sample_rationale")
        if column is None:
            raise self._missing(row, "sample_rationale", place)
        text = _text(row[column], place, column) or ""
        if len(text) > max_chars:
            return None
        answer_column = self._column(row, "sample_answer")
        if answer_column is None:
            parsed = task.parse_teacher_output(text, question.choices)
            rationale, answer, target = parsed.rationale, parsed.answer, parsed.target
        else:
            rationale = text
            answer = _text(row[answer_column], place, answer_column, number=True)
            target = self._optional(row, place, "sample_target")
        return TeacherSample(
            rationale=rationale.strip(),
            answer=answer,
            target=target,
            teacher=self.teacher(row, place),
            temperature=_number(row, "temperature", place, float),
            seed=_number(row, "seed", place, int),
            finish_reason=_text(row.get("finish_reason"), place, "finish_reason"),
            completion_tokens=_number(row, "completion_tokens", place, int),
            fingerprint=_text(row.get("fingerprint"), place, "fingerprint"),
        )


def _with_samples(
    config: ExperimentConfig,
    task: Task,
    columns: _Columns,
    question: Question,
    recorded: list[tuple[Place, Row]],
    known_teachers: set[str],
) -> SourceRow:
    wanted = config.data.teachers
    samples: list[TeacherSample] = []
    too_long = empty = 0
    for place, row in recorded:
        teacher = columns.teacher(row, place)
        known_teachers.add(teacher)
        if wanted is not None and teacher not in wanted:
            continue
        sample = columns.sample(row, place, task, question, config.data.max_rationale_chars)
        if sample is None:
            too_long += 1
        elif not sample.rationale:
            empty += 1
        else:
            samples.append(sample)
    ordered = order_samples(samples, question.id, config.teacher.seed)
    return SourceRow(question, tuple(ordered), too_long, empty)


def _text(value: Any, place: Place, column: str, number: bool = False) -> Any:
    """A text, None for null; a number becomes its text where that is allowed."""
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


def _number(row: Row, column: str, place: Place, kind: type[int | float]) -> Any:
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise UserError(f"{place()}: column {column!r}: expected a number, found {_kind(value)}")
    return kind(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "text"}
    name = names.get(type(value), type(value).__name__)
    if isinstance(value, list):
        inner = sorted({names.get(type(item), type(item).__name__) for item in value})
        return f"{name} with {', '.join(inner)}" if inner else name
    return name


def _arrow_row(row: SourceRow, error: str | None = None) -> dict[str, Any]:
    return {
        **dataclasses.asdict(row.question),
        "samples": [dataclasses.asdict(sample) for sample in row.samples],
        "too_long": row.too_long,
        "empty": row.empty,
        "orphans": row.orphans,
        "error": error,
    }


class _FlatSamples:
    """Samples in a table of their own beside the questions, looked up by id.

    The table may be in any order and larger than memory, so it goes through a temporary SQLite file.
    """

    def __init__(self, config: ExperimentConfig, columns: _Columns, kind: str, folder: Path, split: str | None) -> None:
        self.path = _find_file(folder, f"{split}.teacher_samples") if kind == "folder" and split else None
        self._columns = columns

    def __enter__(self) -> Self:
        if self.path is None:
            return self
        self._folder = tempfile.TemporaryDirectory(prefix="qcrd-samples-")
        self._database = sqlite3.connect(str(Path(self._folder.name) / "samples.sqlite"))
        self._database.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;")
        self._database.execute("CREATE TABLE samples (identity INTEGER, number INTEGER, row TEXT)")
        self._database.executemany("INSERT INTO samples VALUES (?, ?, ?)", self._rows(self.path))
        self._database.execute("CREATE INDEX by_identity ON samples (identity, number)")
        return self

    def _rows(self, path: Path) -> Iterator[tuple[int, int, str]]:
        for place, row in _file_rows(path):
            identity = stable_hash(self._columns.sample_id(row, place))
            yield identity, _number_of(place), json.dumps(row, default=str)

    def of(self, question_id: str) -> list[tuple[Place, Row]]:
        assert self.path is not None
        unit = "row" if self.path.suffix == ".parquet" else "line"
        query = "SELECT number, row FROM samples WHERE identity = ? ORDER BY number"
        found = self._database.execute(query, (stable_hash(question_id),))
        return [(_place(self.path, unit, number), json.loads(row)) for number, row in found]

    def orphans(self, questions: Mapping[int, int]) -> int:
        """Samples whose id is none of those questions' (hashed) ids."""
        if self.path is None:
            return 0
        found = self._database.execute("SELECT identity, COUNT(*) FROM samples GROUP BY identity")
        return sum(count for identity, count in found if identity not in questions)

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            self._database.close()
            self._folder.cleanup()
