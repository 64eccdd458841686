"""What training exports to Prometheus."""

from __future__ import annotations

from typing import Any

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.prometheus import (
    SNAPSHOT_AGE_STEPS,
    TRAIN_ACTIVE_RATIO,
    TRAIN_CHECKPOINT_SECONDS,
    TRAIN_CHECKPOINTS,
    TRAIN_LOSS,
    TRAIN_PUBLISH_SECONDS,
    TRAIN_STALL_SECONDS,
    TRAIN_STEP,
    TRAIN_TOKENS,
    TRAIN_TOKENS_PER_SECOND,
    TRAIN_WARMUP_SECONDS,
    Exporter,
)
from qcrd_ray.sampling.schedule import FIXED, Schedule
from qcrd_ray.training.checkpoint import Progress


class TrainingExporter:
    """What rank 0 exports, once a step."""

    def __init__(self, config: ExperimentConfig, progress: Progress) -> None:
        """
        Args:
            progress: from which training starts.
        """
        self.exporter = Exporter(config.run_name)
        self.schedule = Schedule.of(config)
        self.samples = config.sampled_negatives > 0
        self.before = progress

    def step(self, record: dict[str, Any], progress: Progress) -> None:
        """Export a step's line of metrics, and the run's progress after it."""
        to, before = self.exporter, self.before
        to.set(TRAIN_STEP, progress.step)
        to.add(TRAIN_TOKENS, record["tokens"])
        to.set(TRAIN_TOKENS_PER_SECOND, record["tokens"] / max(record["seconds"], 1e-9))
        to.set(TRAIN_LOSS, record["loss"])
        if record["active_fraction"] is not None:
            to.set(TRAIN_ACTIVE_RATIO, record["active_fraction"])
        to.add(TRAIN_STALL_SECONDS, progress.stall_seconds - before.stall_seconds)
        to.add(TRAIN_WARMUP_SECONDS, progress.warmup_seconds - before.warmup_seconds)
        to.add(TRAIN_PUBLISH_SECONDS, progress.publish_seconds - before.publish_seconds)
        snapshot = self.schedule.snapshot_for(record["iteration"])
        if self.samples and snapshot != FIXED:
            to.set(SNAPSHOT_AGE_STEPS, record["step"] - snapshot * self.schedule.iteration_steps)
        self.before = progress

    def checkpoint(self, seconds: float) -> None:
        """Export that a checkpoint was written."""
        self.exporter.add(TRAIN_CHECKPOINTS, 1)
        self.exporter.add(TRAIN_CHECKPOINT_SECONDS, seconds)
