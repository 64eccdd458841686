"""Which snapshot serves which iteration, and which steps are sampled together. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from qcrd_ray.config import ExperimentConfig

FIXED = -1
"""The number of a snapshot that is no iteration's: `negatives.source=fixed`."""


@dataclass(frozen=True)
class Chunk:
    """Steps `first`..`last`-1 of one iteration, sampled together from one snapshot."""

    iteration: int
    number: int
    first: int
    last: int

    @property
    def file_name(self) -> str:
        return f"iteration-{self.iteration:06d}-chunk-{self.number:04d}.parquet"


@dataclass(frozen=True)
class Schedule:
    """θ_t is the student at the start of iteration t; iteration t takes its negatives from θ_max(0, t - lag).

    Attributes:
        max_steps, iteration_steps: of the run.
        chunk_steps: steps that are sampled together, at most; a chunk never spans two iterations.
        lag: j, or None where one fixed student serves all iterations.
        eval_interval: steps between evaluations; 0: none but the first and the last.
    """

    max_steps: int
    iteration_steps: int
    chunk_steps: int
    lag: int | None
    eval_interval: int = 0

    @classmethod
    def of(cls, config: ExperimentConfig) -> Schedule:
        fixed = config.negatives.source.startswith("fixed")
        chunk_steps = max(1, config.sampler.chunk_questions // config.train.batch_size)
        train = config.train
        lag = None if fixed else config.negatives.lag
        return cls(train.max_steps, train.iteration_steps, chunk_steps, lag, train.eval_interval)

    @property
    def iterations(self) -> int:
        return -(-self.max_steps // self.iteration_steps)

    def iteration_of(self, step: int) -> int:
        return step // self.iteration_steps

    def starts_iteration(self, step: int) -> bool:
        return step % self.iteration_steps == 0

    def snapshot_for(self, iteration: int) -> int:
        """Number of the snapshot that iteration's negatives come from."""
        return FIXED if self.lag is None else max(0, iteration - self.lag)

    def is_needed(self, snapshot: int) -> bool:
        """Whether an iteration takes its negatives from this snapshot."""
        if self.lag is None:
            return snapshot == FIXED
        return snapshot == 0 or snapshot + self.lag < self.iterations

    def is_evaluated(self, snapshot: int) -> bool:
        """Whether an evaluation falls due between the start of the iteration before and that of this one."""
        if self.eval_interval == 0 or not 0 < snapshot < self.iterations:
            return False
        start, before = snapshot * self.iteration_steps, (snapshot - 1) * self.iteration_steps
        return start // self.eval_interval > before // self.eval_interval

    def chunks(self, iteration: int) -> list[Chunk]:
        start = iteration * self.iteration_steps
        end = min(start + self.iteration_steps, self.max_steps)
        firsts = range(start, end, self.chunk_steps)
        return [Chunk(iteration, n, first, min(first + self.chunk_steps, end)) for n, first in enumerate(firsts)]

    def chunk_of(self, step: int) -> Chunk:
        iteration = self.iteration_of(step)
        start = iteration * self.iteration_steps
        end = min(start + self.iteration_steps, self.max_steps)
        number = (step - start) // self.chunk_steps
        first = start + number * self.chunk_steps
        return Chunk(iteration, number, first, min(first + self.chunk_steps, end))
