"""What came of a training run: the students scored, the best of them kept, the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.rationales.counts import Counts
from qcrd_ray.run_folder import RunFolder
from qcrd_ray.sampling.schedule import Schedule
from qcrd_ray.sampling.student_engine import engine_spec
from qcrd_ray.sampling.teacher import Prepared
from qcrd_ray.training.checkpoint import newest_progress
from qcrd_ray.training.stopping import Stop


@dataclass(frozen=True)
class Outcome:
    """What `result.json` says of the students.

    Attributes:
        snapshot: of the student that is kept.
    """

    snapshot: int
    accuracy: dict[str, Any]
    evaluations: list[dict[str, Any]]
    examples: list[dict[str, Any]]


def held_out(counts: Counts) -> list[str]:
    return [split for split in ("valid", "test") if split in counts.held_out]


def reported_split(counts: Counts) -> str:
    return held_out(counts)[-1]


def evaluate(
    config: ExperimentConfig,
    run: RunFolder,
    counts: Counts,
    service: Any,
    before: dict[str, Any],
    examples_before: Any,
    stop: Stop,
) -> Outcome:
    """Choose the best student by valid, report on test; without a test split the last student on valid."""
    last = Schedule.of(config).iterations
    split = reported_split(counts)
    chosen = last
    selected = "last"
    if split == "test" and "valid" in counts.held_out:
        stop.get(service.evaluate.remote(last, "valid"))
        best = stop.get(service.best_snapshot.remote())
        chosen, selected = int(best["snapshot"]), "best by valid"
    after = stop.get(service.evaluate.remote(chosen, split))
    first = stop.get(before[split])
    explained = stop.get(service.explain.remote(chosen, split, config.evaluation.examples))
    examples = [
        {**new, "rationale_before": old["rationale"], "label_before": old["label"]}
        for old, new in zip(stop.get(examples_before), explained, strict=True)
    ]
    accuracy = {
        "before": first["accuracy"],
        "after": after["accuracy"],
        "split": split,
        "n": after["n"],
        "student": selected,
        "step": min(chosen * config.train.iteration_steps, config.train.max_steps),
    }
    return Outcome(chosen, accuracy, stop.get(service.all_evaluations.remote()), examples)


def result_of(
    config: ExperimentConfig,
    run: RunFolder,
    prepared: Prepared,
    outcome: Outcome,
    statistics: dict[str, Any],
    resumed_from: int,
    seconds: float,
) -> dict[str, Any]:
    progress = newest_progress(run)
    assert progress is not None
    sampled = config.sampled_negatives > 0
    steps_seconds = max(progress.seconds, 1e-9)
    return {
        "job": "train",
        "name": config.run_name,
        "method": config.method,
        "task": config.task,
        "student": config.student.model,
        "steps": progress.step,
        "seconds": round(seconds, 1),
        "accuracy": outcome.accuracy,
        "evaluations": outcome.evaluations,
        "train_tokens_per_second": round(progress.tokens / steps_seconds, 1),
        "negatives": {
            "requested": progress.negatives_requested,
            "used": progress.negatives_used,
            "empty": progress.negatives_empty,
            "lag_min": progress.lag_min,
            "lag_max": progress.lag_max,
            "active_fraction": progress.active / progress.with_negative if progress.with_negative else 0.0,
            "stall_seconds": round(progress.stall_seconds, 2),
            "stall_fraction": round(progress.stall_seconds / steps_seconds, 4),
            "warmup_seconds": round(progress.warmup_seconds, 2),
            "engine": engine_spec(config).engine if sampled else None,
            "sampler": statistics,
        },
        "judge": {
            "pretrained_steps": progress.judge_pretrained_steps,
            "updates": progress.judge_steps - progress.judge_pretrained_steps,
            "reused": progress.judge_reused,
        },  # fmt: skip
        "snapshots": {
            "published": progress.snapshots,
            "publish_seconds": round(progress.publish_seconds, 3),
            "publish_fraction": round(progress.publish_seconds / steps_seconds, 5),
        },
        "checkpoint_seconds": round(progress.checkpoint_seconds, 3),
        "cut": {"prompts": progress.cut_prompts, "targets": progress.cut_targets},
        "teacher": {
            "engine": config.teacher.engine if config.uses_rationales else None,
            "sampled": prepared.outcome.sampled if prepared.outcome else 0,
            "reused": prepared.outcome.plan.reused if prepared.outcome else 0,
        },
        "data": prepared.counts.model_dump(mode="json"),
        "examples": outcome.examples,
        "resumed_from_step": resumed_from,
        "training_starts": statistics.pop("training_starts"),
        "run": str(run),
    }
