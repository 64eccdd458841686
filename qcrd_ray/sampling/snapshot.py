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
PROBE_TOKENS = 32
BF16_TOLERANCE, FP32_TOLERANCE = 0.05, 0.001


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


def probe(run: RunFolder, model: str, config: ExperimentConfig) -> tuple[list[int], list[int]]:
    """Prompt and target token ids of the probe text: the first question of training, with its first rationale.

    Args:
        model: folder or name that the student's tokenizer is loaded from.
    """
    tokenizer, task = student_tools(model, config)
    table, order = training_table(run, config)
    [record] = rows_at(table, order.batch(0)[:1])
    prompt, _ = tokenizer.prompt(EXPLAIN, task.student_input(record["question"], record["choices"]))
    text = next(iter(record["positives"]), record["label"])
    return prompt, tokenizer.target(text, min(PROBE_TOKENS, config.student.max_rationale_tokens)).ids


def write_description(folder: Path, number: int, step: int, probe_logprob: float | None) -> None:
    """Write what a snapshot's folder says of itself: the trainer's mean log-probability of the probe, nats a token."""
    record = {"snapshot": number, "step": step, "probe_logprob": probe_logprob}
    (folder / DESCRIPTION).write_text(json.dumps(record) + "\n", encoding="utf-8")


def check_weights(
    engine: SamplingEngine, folder: Path, asked: tuple[list[int], list[int]], tolerance: float, where: str
) -> float | None:
    """Hold the engine's log-probability of the probe against the trainer's; give back the difference in nats a token.

    Returns:
        None where the folder has no probe (it was not the trainer that wrote it).

    Raises:
        WrongWeights: they differ by more than the tolerance.
    """
    try:
        expected = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["probe_logprob"]
    except FileNotFoundError:
        return None
    if expected is None:
        return None
    prompt, target = asked
    [values] = engine.target_logprobs([prompt], [target])
    found = sum(values) / len(values)
    if not abs(found - expected) <= tolerance:
        raise WrongWeights(
            f"{where}: the engine gives the probe text {found:.4f} nats a token, the trainer {expected:.4f}; it does "
            f"not hold this snapshot (tolerance {tolerance:g}, sampler.verify_tolerance)"
        )
    return abs(found - expected)


def probe_tolerance(config: ExperimentConfig) -> float:
    """`sampler.verify_tolerance`, or what the precisions allow."""
    if config.sampler.verify_tolerance is not None:
        return config.sampler.verify_tolerance
    bf16 = "bf16" in (config.sampler.precision, config.train.precision)
    return BF16_TOLERANCE if bf16 else FP32_TOLERANCE
