"""What a run exports to Prometheus, through the metrics agent of the Ray node that it is measured on.

The declarations below are the one list of names; docs/observability.md and the Grafana dashboard are held against it.
Ray puts `ray_` before every name. It drops a gauge soon after its process is gone, and a counter begins anew with its
process, as `rate()` expects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """One name.

    Attributes:
        tags: beside `run`.
    """

    name: str
    kind: Literal["gauge", "counter"]
    description: str
    tags: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """The name that Prometheus sees."""
        return f"ray_{self.name}"


TRAIN_STEP = Metric("qcrd_train_step", "gauge", "Optimizer steps done.")
TRAIN_TOKENS = Metric("qcrd_train_tokens_total", "counter", "Tokens trained on, of all workers.")
TRAIN_TOKENS_PER_SECOND = Metric(
    "qcrd_train_tokens_per_second", "gauge", "Tokens of the last step, of all workers, by its seconds."
)
TRAIN_LOSS = Metric("qcrd_train_loss", "gauge", "Loss of the last step, mean over the global batch.")
TRAIN_ACTIVE_RATIO = Metric(
    "qcrd_train_active_ratio", "gauge", "Share of the last step's questions whose chosen negative is inside the margin."
)
TRAIN_STALL_SECONDS = Metric(
    "qcrd_train_stall_seconds_total", "counter", "Seconds for which training waited for negatives, after the first."
)
TRAIN_WARMUP_SECONDS = Metric(
    "qcrd_train_warmup_seconds_total", "counter", "Seconds for which training waited for its first negatives."
)
TRAIN_PUBLISH_SECONDS = Metric(
    "qcrd_train_publish_seconds_total", "counter", "Seconds for which training stood still to take snapshots."
)
TRAIN_CHECKPOINTS = Metric("qcrd_train_checkpoints_total", "counter", "Checkpoints written.")
TRAIN_CHECKPOINT_SECONDS = Metric(
    "qcrd_train_checkpoint_seconds_total", "counter", "Seconds for which training stood still to write checkpoints."
)
SNAPSHOT_AGE_STEPS = Metric(
    "qcrd_snapshot_age_steps", "gauge", "Steps since the snapshot was taken that the last step's negatives come from."
)
SNAPSHOT_AGE_SECONDS = Metric("qcrd_snapshot_age_seconds", "gauge", "Seconds since the newest snapshot was published.")
CHUNKS_READY = Metric(
    "qcrd_chunks_ready",
    "gauge",
    "Chunks of negatives that lie ready for the current iteration, used or not, and for those to come.",
)
SAMPLER_QUEUE_DEPTH = Metric("qcrd_sampler_queue_depth", "gauge", "Pieces of work that wait for a sampler.")
SAMPLERS_UP = Metric("qcrd_samplers_up", "gauge", "Samplers that answer.")
SAMPLER_TOKENS = Metric("qcrd_sampler_tokens_total", "counter", "Tokens of the negatives sampled.", ("sampler",))
SAMPLER_BUSY_SECONDS = Metric(
    "qcrd_sampler_busy_seconds_total", "counter", "Seconds spent on sampling negatives.", ("sampler",)
)
SAMPLER_LOAD_SECONDS = Metric(
    "qcrd_sampler_load_seconds_total", "counter", "Seconds spent on loading snapshots, with their check.", ("sampler",)
)
SAMPLER_RESTARTS = Metric(
    "qcrd_sampler_restarts_total",
    "counter",
    "Failures of a sampler, which is then started anew. Absent before the first.",
    ("sampler",),
)

METRICS = tuple(value for value in globals().values() if isinstance(value, Metric))
"""All of the above."""


class Exporter:
    """Sets metrics of one process of a run. A metric is made when it is first set."""

    def __init__(self, run_name: str) -> None:
        self.run_name = run_name
        self._made: dict[str, Any] = {}

    def set(self, metric: Metric, value: float, **tags: str) -> None:
        """Give a gauge its value."""
        self._of(metric).set(value, tags={"run": self.run_name, **tags})

    def add(self, metric: Metric, amount: float, **tags: str) -> None:
        """Raise a counter; nothing happens for an amount of 0, which Ray refuses."""
        if amount > 0:
            self._of(metric).inc(amount, tags={"run": self.run_name, **tags})

    def _of(self, metric: Metric) -> Any:
        if metric.name not in self._made:
            from ray.util.metrics import Counter, Gauge

            kind = Counter if metric.kind == "counter" else Gauge
            self._made[metric.name] = kind(metric.name, metric.description, ("run", *metric.tags))
        return self._made[metric.name]
