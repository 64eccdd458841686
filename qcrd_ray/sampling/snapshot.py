"""A snapshot of the student as samplers know it, and the proof that an engine holds it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError
from qcrd_ray.rationales.streaming import student_tools, training_table
from qcrd_ray.rationales.tables import rows_at
from qcrd_ray.run_folder import RunFolder
from qcrd_ray.sampling.engine import SamplingEngine
from qcrd_ray.tasks.prompts import EXPLAIN

DESCRIPTION = "snapshot.json"
PROBE_QUESTIONS, PROBE_TOKENS = 8, 32
"""In bf16 two ways to compute the same model differ by up to 0.05 nats a token on one short text, by 0.01 on eight."""
FP32_TOLERANCE, BF16_TOLERANCE, ROUNDED_TOLERANCE = 0.001, 0.05, 1.0
"""The last where an engine rounds weights to bf16 that training holds in fp32, or as adapters apart: what a few updates
have moved is less than what rounding takes away, so that the two are different models."""

Probe = list[tuple[list[int], list[int]]]
"""Prompt and target token ids of each text."""


@dataclass(frozen=True)
class Snapshot:
    """θ_`number`, complete in the run's storage.

    Attributes:
        folder: its name in the run.
        digest: of its content; negatives carry it, so that none is taken for another's.
    """

    number: int
    folder: str
    digest: str

    @classmethod
    def of(cls, run: RunFolder, number: int, folder: str) -> Snapshot:
        return cls(number, folder, run.digest(folder))


class WrongWeights(UserError):
    """An engine does not hold the weights of the snapshot that it was told to load."""


def probe(run: RunFolder, model: str, config: ExperimentConfig) -> Probe:
    """The probe texts: the first questions of training, each with its first rationale.

    Args:
        model: folder or name that the student's tokenizer is loaded from.
    """
    tokenizer, task = student_tools(model, config)
    table, order = training_table(run, config)
    longest = min(PROBE_TOKENS, config.student.max_rationale_tokens)
    texts: Probe = []
    rows = [row for step in range(PROBE_QUESTIONS) for row in order.batch(step)]
    for record in rows_at(table, rows[:PROBE_QUESTIONS]):
        prompt, _ = tokenizer.prompt(EXPLAIN, task.student_input(record["question"], record["choices"]))
        text = next(iter(record["positives"]), record["label"])
        texts.append((prompt, tokenizer.target(text, longest).ids))
    return texts


def write_description(folder: Path, number: int, step: int, probe_logprob: float | None) -> None:
    """Write what a snapshot's folder says of itself.

    Args:
        probe_logprob: the trainer's mean log-probability of the probe texts, nats a token.
    """
    record = {"snapshot": number, "step": step, "probe_logprob": probe_logprob}
    (folder / DESCRIPTION).write_text(json.dumps(record) + "\n", encoding="utf-8")


def check_weights(engine: SamplingEngine, folder: Path, asked: Probe, tolerance: float, where: str) -> float | None:
    """Hold the engine's mean log-probability of the probe texts against the trainer's.

    Returns:
        Their difference, nats a token; None where the folder has no probe (it was not the trainer that wrote it).

    Raises:
        WrongWeights: they differ by more than the tolerance.
    """
    try:
        expected = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["probe_logprob"]
    except FileNotFoundError:
        return None
    if expected is None:
        return None
    prompts, targets = zip(*asked, strict=True)
    values = [value for of_text in engine.target_logprobs(prompts, targets) for value in of_text]
    found = sum(values) / len(values)
    if not abs(found - expected) <= tolerance:
        raise WrongWeights(
            f"{where}: the engine gives the probe texts {found:.4f} nats a token, the trainer {expected:.4f}; it does "
            f"not hold this snapshot (tolerance {tolerance:g}, sampler.verify_tolerance)"
        )
    return abs(found - expected)


def probe_tolerance(config: ExperimentConfig) -> float:
    """`sampler.verify_tolerance`, or what the precisions allow."""
    if config.sampler.verify_tolerance is not None:
        return config.sampler.verify_tolerance
    train, sampler = config.train.precision, config.sampler.precision
    if sampler == "bf16" and (train == "fp32" or config.student.lora.rank):
        return ROUNDED_TOLERANCE
    return BF16_TOLERANCE if "bf16" in (train, sampler) else FP32_TOLERANCE
