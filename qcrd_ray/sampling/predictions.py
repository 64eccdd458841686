"""What a student writes for questions: labels that a task scores, and rationales to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.rationales.streaming import student_tools
from qcrd_ray.sampling.engine import Request, SamplingEngine, SamplingParameters
from qcrd_ray.seeding import stable_hash
from qcrd_ray.tasks.prompts import EXPLAIN, PREDICT, SEPARATOR, SEPARATOR_TOKENS


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
        _, label = rationale_and_label(config, text)
        correct = task.is_correct(label, record["label"], record["answer"], record["choices"])
        predictions.append(Prediction(record["id"], text, bool(correct)))
    return predictions


def explain(
    engine: SamplingEngine, config: ExperimentConfig, model: str, records: Sequence[dict[str, Any]]
) -> list[dict[str, str]]:
    """{id, question, gold, rationale, label} of each record, as the student writes them."""
    _, task = student_tools(model, config)
    labels = write(engine, config, model, records, PREDICT)
    if config.method == "single_task":
        written = [rationale_and_label(config, text) for text in labels]
    else:
        written = list(zip(write(engine, config, model, records, EXPLAIN), labels, strict=True))
    return [
        {
            "id": record["id"],
            "question": task.student_input(record["question"], record["choices"]),
            "gold": record["label"],
            "rationale": rationale,
            "label": label,
        }
        for record, (rationale, label) in zip(records, written, strict=True)
    ]


def write(
    engine: SamplingEngine, config: ExperimentConfig, model: str, records: Sequence[dict[str, Any]], prefix: str
) -> list[str]:
    """Greedy continuations of the records' prompts under `<Predict>` or `<Explain>`."""
    tokenizer, task = student_tools(model, config)
    parameters = SamplingParameters(temperature=0.0, max_tokens=most_tokens(config, prefix))
    prompts = [tokenizer.prompt(prefix, task.student_input(r["question"], r["choices"]))[0] for r in records]
    return [g.text.strip() for [g] in engine.generate([Request(tuple(prompt), parameters) for prompt in prompts])]


def observe(
    engine: SamplingEngine,
    config: ExperimentConfig,
    model: str,
    records: Sequence[dict[str, Any]],
    temperature: float,
) -> list[str]:
    """A rationale of each record, sampled at a temperature, else as negatives are; 0 is greedy."""
    tokenizer, task = student_tools(model, config)
    prefix = PREDICT if config.method == "single_task" else EXPLAIN
    parameters = SamplingParameters(
        temperature=temperature,
        top_k=config.negatives.top_k if temperature else 0,
        max_tokens=most_tokens(config, prefix),
        logprobs=False,
    )
    requests = []
    for record in records:
        prompt, _ = tokenizer.prompt(prefix, task.student_input(record["question"], record["choices"]))
        seed = stable_hash(config.train.seed, "observe", temperature, record["id"])
        requests.append(Request(tuple(prompt), parameters, seed))
    texts = [generation.text.strip() for [generation] in engine.generate(requests)]
    if config.method == "single_task":
        return [rationale_and_label(config, text)[0] or text for text in texts]
    return texts


def most_tokens(config: ExperimentConfig, prefix: str) -> int:
    """Tokens that a student writes at most under `<Predict>` or `<Explain>`."""
    if prefix == EXPLAIN:
        return config.student.max_rationale_tokens
    if config.method == "single_task":
        return config.student.max_rationale_tokens + SEPARATOR_TOKENS + config.evaluation.max_new_tokens
    return config.evaluation.max_new_tokens


def rationale_and_label(config: ExperimentConfig, written: str) -> tuple[str, str]:
    """What a student wrote under `<Predict>`, taken apart: a single_task student writes its rationale before the label.

    Without a separator in it, all of it is the label.
    """
    if config.method != "single_task":
        return "", written
    rationale, _, label = written.rpartition(SEPARATOR.strip())
    return rationale.strip(), label.strip()
