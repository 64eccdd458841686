"""Readers: questions and recorded teacher samples, from the files that people have.

`raw_chunks` cuts a source into chunks, in order and unparsed: that is quick, and one process does it, where the files
are. `SplitReader` turns a chunk into questions and samples, wherever it is sent; chunks do not depend on each other.

* A folder with train, valid and perhaps test as .jsonl, .parquet or .csv. Samples are nested in each question
  (`teacher_samples`) or flat in `train.teacher_samples.jsonl|parquet`, which goes through a `sample_index`.
* A Distilling-step-by-step folder: `NAME_train.json`, `llm/train_CoT_0.json` and so on, raw outputs of PaLM.
* `hub:NAME` or `hub:NAME:CONFIGURATION`, a data set for Hugging Face's `datasets`.
* `generated:TASK`, questions that the task makes itself; they have no recorded samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError
from qcrd_ray.rationales.columns import OTHER_TEACHER, RAW, TOO_LONG, WRONG, Columns, RecordedSample
from qcrd_ray.rationales.raw_chunks import (
    RawChunk,
    chunk_rows,
    file_chunks,
    find_file,
    hub_split,
    hub_splits,
    question_file,
    raw_chunks,
    source_name,
    source_of,
)
from qcrd_ray.rationales.sample_index import PartWriter, SampleIndex, merge
from qcrd_ray.rationales.schema import Question, TeacherSample
from qcrd_ray.rationales.self_consistency import order_samples
from qcrd_ray.seeding import stable_hash
from qcrd_ray.tasks import Task, get_task
from qcrd_ray.tasks.base import cut_run_on

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class SourceRow:
    """A question and its samples, in voting order.

    Attributes:
        too_long: samples left out because they exceed `data.max_rationale_chars`.
        empty: samples left out because no rationale stands in them.
        cut: samples whose rationale ran on into another question and was cut.
        orphans: on the last row, samples of a flat table that belong to no question.
        number: of its line or row.
        teachers: all whose samples stand there, chosen or not.
        error: what the user must mend of the row or after it; the last row of a chunk then.
    """

    question: Question
    samples: tuple[TeacherSample, ...] = ()
    too_long: int = 0
    empty: int = 0
    cut: int = 0
    orphans: int = 0
    number: int = field(default=0, compare=False)
    teachers: frozenset[str] = frozenset()
    error: str | None = None


def splits_available(config: ExperimentConfig) -> tuple[str, ...]:
    """Which of train, valid and test the source has. Raises UserError for a source that is not there."""
    kind, location = source_of(config)
    if kind == "generated":
        return tuple(split for split in SPLITS if config.data.generated.get(split))
    if kind == "hub":
        names = hub_splits(location)
        return tuple(split for split in SPLITS if hub_split(names, split))
    return tuple(split for split in SPLITS if question_file(kind, Path(location), split) is not None)


def flat_table(config: ExperimentConfig, split: str) -> Path | None:
    """The flat table of a split's samples, None where there is none."""
    kind, location = source_of(config)
    return find_file(Path(location), f"{split}.teacher_samples") if kind == "folder" else None


def sample_columns(config: ExperimentConfig) -> Columns:
    """Which columns the source's samples have. Raises UserError for a wrong `data.columns`."""
    return Columns(config, source_of(config)[0])


@dataclass(frozen=True)
class StoredLookup:
    """A live teacher's stored samples: where they are found, and what they all have in common."""

    index: SampleIndex
    key: Callable[[Task, Question], int]
    name: str
    temperature: float
    fingerprint: str


class SplitReader:
    """Turns the chunks of a split into questions with their samples. Sent to Ray's workers."""

    def __init__(
        self,
        config: ExperimentConfig,
        split: str,
        samples: bool = True,
        index: SampleIndex | None = None,
        stored: StoredLookup | None = None,
    ) -> None:
        """
        Args:
            samples: False leaves the recorded samples out (held-out splits, live teachers).
            index: of the split's flat table, where it has one.
            stored: takes a live teacher's samples in the place of recorded ones.
        """
        self._config, self._split = config, split
        self._samples, self._index, self._stored = samples and stored is None, index, stored
        self._generated = source_of(config)[0] == "generated"
        self._columns = sample_columns(config)
        self._task = get_task(config)

    def rows(self, chunk: RawChunk) -> list[SourceRow]:
        """The rows of a chunk; after one with `error` there is none."""
        rows, nested, error = self._questions(chunk)
        if self._stored is not None:
            key = self._stored.key
            found = self._stored.index.find([key(self._task, row.question) for row in rows])
            rows = [self._with_stored(row, samples) for row, samples in zip(rows, found, strict=True)]
        elif self._samples:
            if self._index is not None:
                nested = self._index.find([stable_hash(row.question.id) for row in rows])
            rows = self._with_samples(rows, nested)
        if error is not None and not (rows and rows[-1].error):
            rows.append(SourceRow(Question("", ""), error=error))
        return rows

    def _questions(self, chunk: RawChunk) -> tuple[list[SourceRow], list[list[RecordedSample]], str | None]:
        """Questions, the samples nested in them, and the error that ends them."""
        rows: list[SourceRow] = []
        nested: list[list[RecordedSample]] = []
        take_nested = self._samples and self._index is None
        try:
            for index, (number, place, row) in enumerate(chunk_rows(chunk), start=chunk.first):
                if self._generated:
                    rows.append(SourceRow(Question(**row), number=number))
                    nested.append([])
                    continue
                question = self._columns.question(row, place, index, self._split)
                rows.append(SourceRow(question, number=number))
                try:
                    samples = self._columns.samples(row, place) if take_nested else ()
                    nested.append([self._columns.sample(sample, where) for where, sample in samples])
                except UserError as error:  # of this question, whose id may stand twice, which is said first
                    rows[-1] = SourceRow(question, number=number, error=str(error))
                    nested.append([])
                    return rows, nested, str(error)
        except UserError as error:
            return rows, nested, str(error)
        return rows, nested, None

    def _with_samples(self, rows: list[SourceRow], recorded: Sequence[list[RecordedSample]]) -> list[SourceRow]:
        result: list[SourceRow] = []
        for row, samples in zip(rows, recorded, strict=True):
            if row.error is None:
                row = self._with_recorded(row, samples)
            result.append(row)
            if row.error is not None:
                break
        return result

    def _with_recorded(self, row: SourceRow, recorded: list[RecordedSample]) -> SourceRow:
        wrong = next((sample.text for sample in recorded if sample.state == WRONG), None)
        if wrong is not None:
            return dataclasses.replace(row, error=wrong)
        taken = [sample for sample in recorded if sample.state != OTHER_TEACHER]
        samples, too_long, empty, cut = read_samples(taken, self._task, row.question)
        ordered = order_samples(samples, row.question.id, self._config.teacher.seed)
        teachers = frozenset(sample.teacher for sample in recorded if sample.teacher is not None)
        return SourceRow(row.question, tuple(ordered), too_long, empty, cut, number=row.number, teachers=teachers)

    def _with_stored(self, row: SourceRow, recorded: list[RecordedSample]) -> SourceRow:
        assert self._stored is not None
        first: dict[int | None, RecordedSample] = {}
        for sample in recorded:
            first.setdefault(sample.sample_index, sample)
        taken = [
            first[index]._replace(
                teacher=self._stored.name,
                temperature=self._stored.temperature,
                fingerprint=self._stored.fingerprint,
            )
            for index in sorted(first, key=lambda index: index or 0)
        ]
        samples, too_long, empty, cut = read_samples(taken, self._task, row.question)
        return dataclasses.replace(row, samples=tuple(samples), too_long=too_long, empty=empty, cut=cut)


def read_samples(
    recorded: Sequence[RecordedSample], task: Task, question: Question
) -> tuple[list[TeacherSample], int, int, int]:
    """(samples, too long, empty, cut): raw outputs are parsed, and what runs on into another question is cut."""
    samples: list[TeacherSample] = []
    too_long = empty = cut = 0
    for sample in recorded:
        if sample.state == TOO_LONG or sample.text is None:
            too_long += 1
            continue
        whole = sample.text.strip()
        rationale, answer, target = cut_run_on(whole), sample.answer, sample.target
        cut += len(rationale) < len(whole)
        if sample.state == RAW:
            parsed = task.parse_teacher_output(rationale, question.choices)
            rationale, answer, target = parsed.rationale.strip(), parsed.answer, parsed.target
        if not rationale:
            empty += 1
            continue
        samples.append(TeacherSample(rationale, answer, target, *sample[4:]))
    return samples, too_long, empty, cut


def read_rows(config: ExperimentConfig, task: Task, split: str, samples: bool = True) -> Iterator[SourceRow]:
    """The rows of a split, one by one, in the order of the source, read in this process.

    Args:
        samples: False leaves the recorded samples out (held-out splits, live teachers).

    Raises:
        UserError: as the rows are drawn, at the first thing that the user must mend.
    """
    seen = SeenIds()
    known_teachers: set[str] = set()
    last: SourceRow | None = None
    with _flat_index(config, split if samples else None) as index:
        reader = SplitReader(config, split, samples, index)
        for chunk in raw_chunks(config, split):
            rows = reader.rows(chunk)
            end, error = first_fault(config, split, seen, rows)
            for row in rows[:end]:
                known_teachers |= row.teachers
                if last is not None:
                    yield last
                last = row
            if error is not None:
                if last is not None:
                    yield last
                raise UserError(error)
        if last is None:
            raise UserError(empty_split(config, split))
        yield dataclasses.replace(last, orphans=index.count_others(seen.sorted()) if index is not None else 0)
    if samples:
        check_teachers(config, known_teachers)


def first_fault(
    config: ExperimentConfig, split: str, seen: SeenIds, rows: Sequence[SourceRow]
) -> tuple[int, str | None]:
    """(rows that are good, what is wrong with the next): its id stands twice, or it says an error itself."""
    end = next((i for i, row in enumerate(rows) if row.error is not None), len(rows))
    error = rows[end].error if end < len(rows) else None
    named = [row for row in rows[: end + 1] if row.question.id]
    twice = seen.add(identities(row.question.id for row in named), np.array([row.number for row in named], np.int64))
    if twice is not None:
        place, first = twice
        return place, stands_twice(config, split, named[place].question.id, named[place].number, first)
    return end, error


def identities(ids: Iterator[str]) -> np.ndarray:
    return np.fromiter((stable_hash(identity) for identity in ids), np.int64)


def stands_twice(config: ExperimentConfig, split: str, question_id: str, number: int, first: int) -> str:
    """The error of an id that two rows have, by their numbers."""
    name, unit = source_name(config, split), "row"
    kind, _ = source_of(config)
    if kind == "hub":
        name = f"{config.data.path} {hub_split(hub_splits(source_of(config)[1]), split)}"
    elif kind == "dss" or name.endswith((".jsonl", ".csv")):
        unit = "line"
    place = f"{name}:{number}" if unit == "line" else f"{name} row {number}"
    return f"{place}: id {question_id!r} stands twice, first at {unit} {first}"


def empty_split(config: ExperimentConfig, split: str) -> str:
    return f"{source_name(config, split)}: the split {split!r} is empty"


def check_teachers(config: ExperimentConfig, known: set[str]) -> None:
    """Raises UserError where `data.teachers` names one that has no samples."""
    unknown = sorted(set(config.data.teachers or ()) - known)
    if unknown:
        there = ", ".join(sorted(known)) or "none: no question has teacher samples"
        raise UserError(f"config key data.teachers: no samples of {', '.join(map(repr, unknown))}; known: {there}")


class SeenIds:
    """Which (hashed) ids have been met, and where: 16 bytes an id, in sorted runs that double in size."""

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, identities: np.ndarray, numbers: np.ndarray) -> tuple[int, int] | None:
        """Add ids with the numbers of their rows; (place among them, number of the first) of the first met before."""
        order = np.argsort(identities, kind="stable")
        keys, numbers_sorted = identities[order], numbers[order]
        again = np.flatnonzero(keys[1:] == keys[:-1]) + 1
        found = [(int(order[i]), int(numbers_sorted[i - 1])) for i in again]
        for run_keys, run_numbers in self._runs:
            near = np.minimum(np.searchsorted(run_keys, keys), len(run_keys) - 1)
            found += [(int(order[i]), int(run_numbers[near[i]])) for i in np.flatnonzero(run_keys[near] == keys)]
        if found:
            return min(found)
        if not len(keys):
            return None
        while self._runs and len(self._runs[-1][0]) <= len(keys):
            run_keys, run_numbers = self._runs.pop()
            keys, numbers_sorted = np.concatenate([run_keys, keys]), np.concatenate([run_numbers, numbers_sorted])
            order = np.argsort(keys, kind="stable")
            keys, numbers_sorted = keys[order], numbers_sorted[order]
        self._runs.append((keys, numbers_sorted))
        return None

    def sorted(self) -> np.ndarray:
        """All ids, [n] int64."""
        return np.sort(np.concatenate([keys for keys, _ in self._runs] or [np.empty(0, np.int64)]))


@contextlib.contextmanager
def _flat_index(config: ExperimentConfig, split: str | None) -> Iterator[SampleIndex | None]:
    """The index of a split's flat table, made here and gone at the end; None where there is no such table."""
    table = flat_table(config, split) if split else None
    if table is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="qcrd-samples-") as folder:
        columns = sample_columns(config)
        writer = PartWriter(Path(folder))
        for chunk in file_chunks(table):
            error = writer.write_chunk(chunk, columns)
            if error is not None:
                raise UserError(error)
        yield merge(Path(folder))


def source_fingerprint(config: ExperimentConfig) -> str:
    """A hash of the content of all files that the source reads; of its name, where it reads none."""
    kind, location = source_of(config)
    digest = hashlib.sha256(f"{kind}:{location}".encode() if kind in ("hub", "generated") else kind.encode())
    if kind not in ("hub", "generated"):
        folder = Path(location)
        files = [question_file(kind, folder, split) for split in SPLITS]
        files += [find_file(folder, f"{split}.teacher_samples") for split in SPLITS]
        files += sorted(folder.glob("llm/*_CoT_*.json")) if kind == "dss" else []
        for path in files:
            if path is not None:
                with path.open("rb") as file:
                    digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
