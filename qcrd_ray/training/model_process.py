"""What the driver of a run needs models for, in a process beside it.

The libraries of models take seconds to import. In a process of their own that is done by the time the tables are, and
runs that share a driver (the trials of a test, of a notebook) share it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.models.discriminator import Discriminator
from qcrd_ray.run_folder import JUDGE, RunFolder
from qcrd_ray.training.export import export
from qcrd_ray.training.initial_models import write_models

SCORED_TOGETHER = 64


class ModelProcess:
    """An actor on the driver's node, which does one thing at a time."""

    def __init__(self) -> None:
        # To ask of a model that is saved whether DeepSpeed has it, accelerate would import it, in seconds.
        sys.modules.setdefault("deepspeed", None)  # type: ignore[arg-type]
        from transformers import AutoModel, PreTrainedModel  # noqa: F401

    def write_models(self, config: ExperimentConfig, run: RunFolder) -> None:
        """See `qcrd_ray.training.initial_models`."""
        write_models(config, run)

    def score(
        self, config: ExperimentConfig, run: RunFolder, questions: Sequence[str], rationales: Sequence[str]
    ) -> list[float]:
        """What the run's discriminator thinks of each rationale."""
        discriminator = Discriminator.load(run.get_folder(JUDGE, check=False))
        scores: list[float] = []
        for first in range(0, len(rationales), SCORED_TOGETHER):
            some = slice(first, first + SCORED_TOGETHER)
            scores += discriminator.score(questions[some], rationales[some], config.train.tokens_per_pass).tolist()
        return scores

    def export(self, config: ExperimentConfig, run: RunFolder, snapshot: int, result: Mapping[str, Any]) -> None:
        """See `qcrd_ray.training.export`."""
        export(config, run, snapshot, result)


_lock = threading.Lock()
_started: dict[tuple[str, str], Any] = {}
"""The actor of this process's connection to Ray, by the ids of node and driver; those of earlier ones are gone.

The driver's alone will not do: it follows from the number of the job, and every Ray that is started here begins at 1.
"""


def model_process() -> Any:
    """Handle of this process's ModelProcess, which starts in the background with the first call."""
    context = ray.get_runtime_context()
    with _lock:
        connection = (context.get_node_id(), context.get_worker_id())
        if connection not in _started:
            here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
            actor = ray.remote(ModelProcess).options(
                num_cpus=0, max_restarts=-1, max_task_retries=2, scheduling_strategy=here
            )
            _started.clear()
            _started[connection] = actor.remote()
        return _started[connection]
