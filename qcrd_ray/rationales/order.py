"""Which questions a step trains on: a function of the seed and the step alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from qcrd_ray.seeding import stable_hash


class DataOrder:
    """Epochs of seeded permutations, cut into global batches.

    Attributes:
        rows: rows of the table.
        batch_size: questions a step over all workers; the last batch of an epoch may be shorter.
        seed: of the permutations.
    """

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        if rows < 1:
            raise ValueError("an order needs at least one row")
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = -(-rows // batch_size)

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def batch(self, step: int) -> np.ndarray:
        """Row indices of the global batch of `step`, in their order: [b] int64, b ≤ batch_size."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return _permutation(self.rows, self.seed, epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def share(self, step: int, rank: int, world: int) -> np.ndarray:
        """Row indices of the step that `rank` of `world` trains on: [s] int64, perhaps none."""
        return self.batch(step)[rank::world]


@lru_cache(maxsize=4)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(stable_hash(seed, "epoch", epoch))).permutation(rows)
