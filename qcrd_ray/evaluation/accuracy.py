"""Accuracy of any student folder on any split."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError
from qcrd_ray.models.exported import as_trained
from qcrd_ray.models.named import check_student
from qcrd_ray.rationales.sources import read_rows, splits_available
from qcrd_ray.run_folder import write_text_atomic
from qcrd_ray.sampling.engine import start_engine
from qcrd_ray.sampling.predictions import predict
from qcrd_ray.sampling.student_engine import engine_spec
from qcrd_ray.tasks import get_task

TOGETHER = 512


def evaluate(config: ExperimentConfig) -> dict[str, Any]:
    """Score `student.model` on `evaluation.split`; with `output`, write each prediction to a JSONL file there.

    A folder that training left is asked by its own method and lengths, others by the config's.

    Raises:
        UserError: no such split or student; a split in which no question has a gold answer.
    """
    begin = time.perf_counter()
    model = config.student.model
    if model.startswith("embedded:"):
        from qcrd_ray.models.embedded import embedded_student

        model = str(embedded_student(model.removeprefix("embedded:")))
    elif model.startswith("scratch:"):
        raise UserError(f"config key student.model: {model} has learned nothing; give the folder of a trained student")
    check_student(model, config.student)
    config = as_trained(config, model)
    split = config.evaluation.split
    available = splits_available(config)
    if split not in available:
        raise UserError(
            f"config key evaluation.split: no {split!r} in {config.data.path}; there are {', '.join(available)}"
        )
    engine = start_engine(engine_spec(config, model))
    correct, lines = 0, []
    try:
        for records in _records(config, split):
            for prediction in predict(engine, config, model, records):
                correct += prediction.correct
                line = {"id": prediction.id, "prediction": prediction.text, "correct": prediction.correct}
                lines.append(json.dumps(line))
    finally:
        engine.close()
    if not lines:
        raise UserError(f"split {split!r} of {config.data.path}: no question with a gold answer")
    if config.output:
        write_text_atomic(Path(config.output) / f"predictions-{split}.jsonl", "\n".join(lines) + "\n")
    return {
        "job": "evaluate",
        "task": config.task,
        "student": config.student.model,
        "split": split,
        "n": len(lines),
        "correct": correct,
        "accuracy": correct / len(lines),
        "engine": engine_spec(config, model).engine,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def _records(config: ExperimentConfig, split: str) -> Iterator[list[dict[str, Any]]]:
    """Questions with a gold answer, in batches, as a held-out table has them."""
    task = get_task(config)
    batch: list[dict[str, Any]] = []
    count = 0
    for row in read_rows(config, task, split, samples=False):
        gold = row.question.answer if row.question.answer is not None else row.question.target
        if gold is None or task.canonical_answer(gold, row.question.choices) is None:
            continue
        if count == config.data.eval_limit:
            break
        count += 1
        choices = list(row.question.choices) if row.question.choices is not None else None
        label = task.default_target(gold, row.question.target)
        record = {"id": row.question.id, "question": row.question.question, "choices": choices}
        batch.append({**record, "answer": gold, "label": label})
        if len(batch) == TOGETHER:
            yield batch
            batch = []
    if batch:
        yield batch
