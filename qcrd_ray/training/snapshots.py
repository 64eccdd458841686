"""Publishing θ_t: the student as a Hugging Face folder that engines load from."""

from __future__ import annotations

import torch.distributed as dist

from qcrd_ray.models.student import Student, save_student
from qcrd_ray.run_folder import RunFolder, atomic_folder
from qcrd_ray.training.checkpoint import network_state
from qcrd_ray.training.engine import TrainEngine


def publish_snapshot(run: RunFolder, number: int, engine: TrainEngine, student: Student) -> str | None:
    """Write θ_`number` to `snapshots/`, complete or not at all. A collective.

    Returns:
        Its folder, on rank 0; None elsewhere. A snapshot that is there already is left as it is.
    """
    folder = run.snapshot(number)
    weights = engine.weights()
    if dist.get_rank() != 0 or weights is None:
        return None
    if not folder.exists():
        with atomic_folder(folder) as temporary:
            save_student(student, temporary, network_state(weights))
    return str(folder)
