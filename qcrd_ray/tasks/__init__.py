"""Benchmarks: one file each. Imports no torch, no transformers and no vllm."""

from __future__ import annotations

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.tasks.anli1 import Anli1
from qcrd_ray.tasks.base import Choices, ParsedSample, Shot, Task
from qcrd_ray.tasks.chain_sum import ChainSum
from qcrd_ray.tasks.cqa import CommonsenseQa
from qcrd_ray.tasks.custom import Custom
from qcrd_ray.tasks.esnli import Esnli
from qcrd_ray.tasks.svamp import Svamp

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Svamp, CommonsenseQa, Anli1, Esnli, ChainSum)
}  # fmt: skip


def get_task(config: ExperimentConfig) -> Task:
    """The benchmark that `task` names. Raises UserError for a custom one whose settings cannot be used."""
    return Custom(config.custom) if config.task == "custom" else TASKS[config.task]()


__all__ = ["TASKS", "Choices", "ParsedSample", "Shot", "Task", "get_task"]
