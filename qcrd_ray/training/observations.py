"""What a trained run leaves to look at: rationales of its student at several temperatures, beside the teacher's.

They are a run's `observations/rationales.parquet`, of some questions only, with the scores that its discriminator gives
them. The report draws the paper's figures 5 and 6 from them. Nothing else reads them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError, last_line
from qcrd_ray.rationales.schema import OBSERVATIONS
from qcrd_ray.rationales.self_consistency import RationaleSet, build_rationale_set
from qcrd_ray.rationales.sources import read_rows
from qcrd_ray.rationales.tables import open_rationale_table
from qcrd_ray.run_folder import JUDGE, OBSERVATIONS_FILE, RunFolder
from qcrd_ray.sampling.scripted import ScriptedTeacher
from qcrd_ray.tasks import get_task
from qcrd_ray.training.stopping import Stop

logger = logging.getLogger(__name__)

ROWS_READ = 2_000
"""Of a held-out split, in search of the teacher's samples of the questions that are observed."""

Row = dict[str, Any]


def observe(
    config: ExperimentConfig, run: RunFolder, service: Any, models: Any, snapshot: int, split: str, stop: Stop
) -> None:
    """Write `observations/rationales.parquet`: once, before the samplers are closed.

    The run has its students and its accuracies by then, so whatever fails here is logged and nothing more.

    Raises:
        KeyboardInterrupt: the run was asked to end; the next start observes.

    Args:
        service: handle of the SamplingService.
        models: handle of the ModelProcess.
        snapshot: of the student that the run keeps.
        split: of the questions that are observed, the first ones.
    """
    if not config.evaluation.observed or not config.uses_rationales:
        return
    try:
        rows = [*_of_student(config, run, service, snapshot, split, stop), *the_teacher_s(config, run, split)]
        _score(config, run, models, rows, stop)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=OBSERVATIONS), sink)
        run.write(OBSERVATIONS_FILE, sink.getvalue().to_pybytes())
    except Exception as error:  # of an engine, a discriminator, a source that is gone: the result is worth more
        logger.warning("no rationales are kept for the report: %s", last_line(error))


def temperatures(config: ExperimentConfig) -> list[float]:
    """Those of `evaluation.temperatures`, and that of the negatives."""
    return sorted({*config.evaluation.temperatures, config.negatives.temperature})


def _of_student(
    config: ExperimentConfig, run: RunFolder, service: Any, snapshot: int, split: str, stop: Stop
) -> Iterator[Row]:
    task = get_task(config)
    records = _first_rows(run, split, config.evaluation.observed)
    asked = {t: service.observe.remote(snapshot, split, len(records), t) for t in temperatures(config)}
    for temperature, reference in asked.items():
        for record, text in zip(records, stop.get(reference), strict=True):
            question = task.student_input(record["question"], record["choices"])
            yield _row(split, record["id"], question, "student", text, temperature)


def the_teacher_s(config: ExperimentConfig, run: RunFolder, split: str) -> Iterator[Row]:
    """Positives and negatives of the observed questions where the teacher has samples of them, and of training ones."""
    task = get_task(config)
    for found in _held_out_sets(config, run, split):
        question = task.student_input(found.question, found.choices)
        for kind, texts in (("positive", found.positives), ("negative", found.negatives)):
            yield from (_row(split, found.id, question, kind, text) for text in texts)
    for record in _first_rows(run, "train", config.evaluation.observed):
        question = task.student_input(record["question"], record["choices"])
        for kind in ("positive", "negative"):
            yield from (_row("train", record["id"], question, kind, text) for text in record[f"{kind}s"])


def _held_out_sets(config: ExperimentConfig, run: RunFolder, split: str) -> Iterator[RationaleSet]:
    """Votes over the teacher's samples of observed questions. A live teacher is not asked: it has none of them."""
    if config.teacher.engine not in ("recorded", "scripted"):
        return
    task = get_task(config)
    teacher = ScriptedTeacher(config) if config.teacher.engine == "scripted" else None
    wanted = {record["id"] for record in _first_rows(run, split, config.evaluation.observed)}
    try:
        for row in itertools.islice(read_rows(config, task, split, samples=teacher is None), ROWS_READ):
            if row.question.id not in wanted:
                continue
            wanted.remove(row.question.id)
            samples = row.samples if teacher is None else teacher.sample(task, row.question)
            found = build_rationale_set(row.question, samples, task, config) if samples else None
            if isinstance(found, RationaleSet):
                yield found
            if not wanted:
                return
    except UserError as error:
        logger.info("the teacher's samples of %s are not read: %s", split, error)


def _first_rows(run: RunFolder, split: str, count: int) -> list[Row]:
    records: list[Row] = open_rationale_table(run.table(split)).slice(0, count).to_pylist()
    return records


def _row(split: str, id_: str, question: str, kind: str, text: str, temperature: float | None = None) -> Row:
    return {
        "split": split,
        "id": id_,
        "question": question,
        "kind": kind,
        "temperature": temperature,
        "rationale": text,
        "score": None,
    }


def _score(config: ExperimentConfig, run: RunFolder, models: Any, rows: list[Row], stop: Stop) -> None:
    """Give rows with a rationale the discriminator's scores, where the run has one."""
    if not run.has_folder(JUDGE):
        return
    scored = [row for row in rows if row["rationale"]]
    questions, texts = [row["question"] for row in scored], [row["rationale"] for row in scored]
    for row, score in zip(scored, stop.get(models.score.remote(config, run, questions, texts)), strict=True):
        row["score"] = score
