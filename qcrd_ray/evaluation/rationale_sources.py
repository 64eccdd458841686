"""The rationales that jobs/quality.py measures: a teacher's recorded ones, a student's, or those of a file."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError
from qcrd_ray.evaluation.quality import Measured, Rationale, diversity, measure, summarise
from qcrd_ray.evaluation.student_rationales import (
    choose_rows,
    explaining_student,
    gold_of,
    sample_student,
    student_folder,
)
from qcrd_ray.rationales.columns import UNNAMED_TEACHER, Place, text_of
from qcrd_ray.rationales.raw_chunks import chunk_rows, file_chunks
from qcrd_ray.rationales.schema import Question
from qcrd_ray.rationales.sources import SourceRow
from qcrd_ray.run_folder import writable_folder, write_text_atomic
from qcrd_ray.tasks import Task, get_task
from qcrd_ray.tasks.prompts import load_tokenizer

MEASURED = "rationales.jsonl"
FILES = (".jsonl", ".parquet", ".csv")


@dataclass(frozen=True)
class Source:
    """Rationales of one writer.

    Attributes:
        unknown: rows of a file whose id none of the questions has.
        errors: rows of a file that say why a question was not answered.
    """

    name: str
    rationales: Sequence[Rationale]
    unknown: int = 0
    errors: int = 0


def measure_quality(config: ExperimentConfig) -> dict[str, Any]:
    """Measure the rationales of `quality.of`; with `output`, write every one with its measures there.

    Returns:
        For each writer `all`, and `right` and `wrong` by whether the label beside the rationale is the gold answer.

    Raises:
        UserError: no such split, student or file; no rationale in it.
    """
    begin = time.perf_counter()
    settings, task = config.quality, get_task(config)
    output = writable_folder(config.output, "output") if config.output else None
    of_teacher = settings.of in ("teacher", "both")
    folder = None
    if settings.of in ("student", "both"):
        folder = explaining_student(config, "student.model", config.student.model)
    rows = choose_rows(config, config.evaluation.split, settings.questions, settings.seed, samples=of_teacher)
    sources: list[Source] = []
    if of_teacher:
        sources += _teachers(config, task, rows)
    if folder is not None:
        sources.append(_student(config, task, folder, [row.question for row in rows]))
    if settings.of == "file":
        sources.append(_file(config, task, {row.question.id: row.question for row in rows}))
    sources = _with_tokens(config, folder, sources)
    lines: list[str] = []
    result: dict[str, Any] = {
        "job": "quality",
        "task": config.task,
        "split": config.evaluation.split,
        "questions": len(rows),
        "writers": {},
    }
    for source in sources:
        measured = [measure(rationale, task, settings.ngram) for rationale in source.rationales]
        result["writers"][source.name] = _summaries(config, source, measured)
        lines += [_line(source.name, *pair) for pair in zip(source.rationales, measured, strict=True)]
    if output:
        write_text_atomic(output / MEASURED, "".join(lines))
    result["seconds"] = round(time.perf_counter() - begin, 1)
    return result


def _with_tokens(config: ExperimentConfig, folder: str | None, sources: Sequence[Source]) -> list[Source]:
    """The sources with a count of tokens everywhere, where there is a tokenizer to count them."""
    name = config.quality.tokenizer or folder
    if name is None:
        return list(sources)
    if config.quality.tokenizer is not None:
        name = student_folder(config, "quality.tokenizer", config.quality.tokenizer)
    tokenizer = load_tokenizer(name, config.student)

    def counted(one: Rationale) -> Rationale:
        return one if one.tokens is not None else replace(one, tokens=len(tokenizer.target(one.text, sys.maxsize).ids))

    return [replace(source, rationales=[counted(one) for one in source.rationales]) for source in sources]


def _summaries(config: ExperimentConfig, source: Source, measured: Sequence[Measured]) -> dict[str, Any]:
    settings = config.quality
    texts: dict[str, list[str]] = defaultdict(list)
    for rationale in source.rationales:
        texts[rationale.id].append(rationale.text)
    diversities = [diversity(question, several) for question, several in texts.items() if len(several) > 1]
    options: dict[str, Any] = {"resamples": settings.resamples, "seed": settings.seed}
    groups: dict[str, Any] = {"all": summarise(measured, diversities, **options)}
    for name, right in (("right", True), ("wrong", False)):
        groups[name] = summarise([one for one in measured if one.right is right], **options)
    if source.unknown:
        groups["unknown_ids"] = source.unknown
    if source.errors:
        groups["errors"] = source.errors
    return groups


def _line(writer: str, rationale: Rationale, measured: Measured) -> str:
    record = {"writer": writer, "rationale": rationale.text, "label": rationale.label, "gold": rationale.gold}
    return json.dumps({**asdict(measured), **record}, ensure_ascii=False) + "\n"


def _teachers(config: ExperimentConfig, task: Task, rows: Sequence[SourceRow]) -> list[Source]:
    """The recorded samples, a source for each teacher."""
    found: dict[str, list[Rationale]] = defaultdict(list)
    for row in rows:
        for sample in row.samples:
            found[sample.teacher or UNNAMED_TEACHER].append(
                _rationale(
                    task,
                    row.question,
                    sample.rationale,
                    sample.answer,
                    sample.completion_tokens,
                    None if sample.finish_reason is None else sample.finish_reason == "length",
                )
            )
    if not found:
        raise UserError(
            f"split {config.evaluation.split!r} of {config.data.path}: no question has teacher samples; set "
            "evaluation.split to the one that has, or quality.of=student"
        )
    return [Source(f"teacher {name}", rationales) for name, rationales in sorted(found.items())]


def _student(config: ExperimentConfig, task: Task, folder: str, questions: Sequence[Question]) -> Source:
    settings = config.quality
    (written,) = sample_student(
        config,
        folder,
        questions,
        [settings.temperature],
        samples=settings.samples,
        top_k=config.negatives.top_k,
        seed=settings.seed,
        labels=True,
    )
    rationales = [
        _rationale(task, question, one.rationale, one.label, one.tokens, one.cut)
        for question, several in zip(questions, written, strict=True)
        for one in several
    ]
    return Source(f"student {config.student.model}", rationales)


def _file(config: ExperimentConfig, task: Task, questions: Mapping[str, Question]) -> Source:
    path = Path(str(config.quality.file)).expanduser()
    rationales: list[Rationale] = []
    unknown = errors = 0
    for place, row in _file_rows(path):
        if "error" in row and "rationale" not in row:
            errors += 1
            continue
        if "rationale" not in row:
            raise UserError(f"{place()}: no 'rationale'; there are: {', '.join(map(str, row)) or 'none'}")
        question = questions.get(text_of(row.get("id"), place, "id", number=True) or "")
        text = text_of(row["rationale"], place, "rationale") or ""
        if question is None:
            unknown += 1
            continue
        beside = "label" if "label" in row else "answer"
        label = text_of(row.get(beside), place, beside, number=True)
        tokens = row.get("tokens", row.get("completion_tokens"))
        count = tokens if isinstance(tokens, int) and not isinstance(tokens, bool) else None
        reason = row.get("finish_reason")
        rationales.append(
            _rationale(task, question, text, label, count, None if reason is None else reason == "length")
        )
    if not rationales:
        raise UserError(
            f"config key quality.file: none of the {unknown} rationales in {path} is of a question of the split "
            f"{config.evaluation.split!r} of {config.data.path}; ids must be the same"
        )
    return Source(f"file {path.name}", rationales, unknown, errors)


def _file_rows(path: Path) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"config key quality.file: {path}: no such file, or a folder without .parquet files")
    for file in files:
        if file.suffix not in FILES:
            raise UserError(f"config key quality.file: {file}: expected one of {', '.join(FILES)}")
        for chunk in file_chunks(file):
            for _, place, row in chunk_rows(chunk):
                yield place, row


def _rationale(
    task: Task, question: Question, text: str, label: str | None, tokens: int | None, cut: bool | None
) -> Rationale:
    shown = task.student_input(question.question, question.choices)
    return Rationale(question.id, shown, text, label, gold_of(question), question.choices, tokens, cut)
