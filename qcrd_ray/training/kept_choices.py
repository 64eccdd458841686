"""Chosen positives that are kept for some iterations, so that no pass chooses them anew (`train.choice_interval`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from qcrd_ray.errors import UserError

FILE = "choices.safetensors"
NONE = -1


class KeptChoices:
    """Of each question of the training table the positive that was chosen last, the same on every rank.

    Attributes:
        column: [N] int32, which of the question's positives; -1: none yet.
        iteration: [N] int32, when it was chosen.
    """

    def __init__(self, interval: int, questions: int) -> None:
        """
        Args:
            interval: iterations for which a choice is kept, that in which it is made among them.
            questions: N of the training table.
        """
        self.interval = interval
        self.column = torch.full((questions,), NONE, dtype=torch.int32)
        self.iteration = torch.full((questions,), NONE, dtype=torch.int32)

    def of(self, row: int, iteration: int) -> int:
        """The positive that question `row` keeps in `iteration`; -1 where one is to be chosen."""
        column, chosen = int(self.column[row]), int(self.iteration[row])
        return column if column != NONE and iteration - chosen < self.interval else NONE

    def keep(self, rows: Sequence[int], columns: Sequence[int], iteration: int, batch: int) -> None:
        """Take what was chosen for a global batch. A collective.

        Args:
            rows: questions of this rank's share, every world-th of the batch.
            columns: their chosen positives; -1 where there is none to keep.
            batch: questions of the global batch.
        """
        world = dist.get_world_size()
        told = torch.zeros(2, batch, dtype=torch.int64)
        told[:, dist.get_rank() :: world] = torch.tensor([[row + 1 for row in rows], columns])
        if world > 1:
            dist.all_reduce(told)
        known = (told[0] > 0) & (told[1] != NONE)
        places = told[0][known] - 1
        self.column[places] = told[1][known].int()
        self.iteration[places] = iteration

    def save(self, folder: Path) -> None:
        save_file({"column": self.column, "iteration": self.iteration}, folder / FILE)

    def restore(self, folder: Path) -> None:
        """Raises UserError where the folder, a checkpoint, holds none that fit."""
        file = folder / FILE
        found = load_file(file) if file.exists() else {}
        if found.get("column", torch.empty(0)).shape != self.column.shape:
            raise UserError(f"checkpoint {folder}: {FILE} is missing or of another training table; remove that folder")
        self.column, self.iteration = found["column"], found["iteration"]
