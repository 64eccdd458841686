"""What a student writes for questions, greedily: labels that a task scores, and rationales to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.rationales.streaming import student_tools
from qcrd_ray.sampling.engine import Request, SamplingEngine, SamplingParameters
from qcrd_ray.tasks.prompts import EXPLAIN, PREDICT, SEPARATOR


@dataclass(frozen=True)
class Prediction:
    """What a student wrote for one held-out question."""

    id: str
    text: str
    correct: bool


def predict(
    engine: SamplingEngine, config: ExperimentConfig, model: str, records: Sequence[dict[str, Any]]
) -> list[Prediction]:
    """Labels of held-out records, scored by the task.

    Args:
        model: where the student's tokenizer is loaded from.
        records: rows of a held-out table.
    """
    _, task = student_tools(model, config)
    predictions = []
    for record, text in zip(records, write(engine, config, model, records, PREDICT), strict=True):
        label = text.split(SEPARATOR.strip())[-1].strip() if config.method == "single_task" else text
        correct = task.is_correct(label, record["label"], record["answer"], record["choices"])
        predictions.append(Prediction(record["id"], text, bool(correct)))
    return predictions


def explain(
    engine: SamplingEngine, config: ExperimentConfig, model: str, records: Sequence[dict[str, Any]]
) -> list[dict[str, str]]:
    """{id, question, gold, rationale, label} of each record, as the student writes them."""
    _, task = student_tools(model, config)
    rationales = write(engine, config, model, records, EXPLAIN)
    labels = write(engine, config, model, records, PREDICT)
    return [
        {
            "id": record["id"],
            "question": task.student_input(record["question"], record["choices"]),
            "gold": record["label"],
            "rationale": rationale,
            "label": label,
        }
        for record, rationale, label in zip(records, rationales, labels, strict=True)
    ]


def write(
    engine: SamplingEngine, config: ExperimentConfig, model: str, records: Sequence[dict[str, Any]], prefix: str
) -> list[str]:
    """Greedy continuations of the records' prompts under `<Predict>` or `<Explain>`."""
    tokenizer, task = student_tools(model, config)
    tokens = config.evaluation.max_new_tokens
    if prefix == EXPLAIN:
        tokens = config.student.max_rationale_tokens
    elif config.method == "single_task":
        tokens += config.student.max_rationale_tokens
    parameters = SamplingParameters(temperature=0.0, max_tokens=tokens)
    prompts = [tokenizer.prompt(prefix, task.student_input(r["question"], r["choices"]))[0] for r in records]
    return [g.text.strip() for [g] in engine.generate([Request(tuple(prompt), parameters) for prompt in prompts])]
