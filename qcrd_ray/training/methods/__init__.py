"""What can stand in `method=`. A method is a short file: which rationales of a question it may use, and its loss."""

from __future__ import annotations

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.training.methods import dss, finetune, mi, mi_qcrd, qcrd, single_task
from qcrd_ray.training.methods.base import Candidates, Method, Terms

METHODS: dict[str, Method] = {
    "finetune": finetune.METHOD,
    "single_task": single_task.METHOD,
    "dss": dss.METHOD,
    "mi": mi.METHOD,
    "qcrd": qcrd.METHOD,
    "mi+qcrd": mi_qcrd.METHOD,
}


def method_of(config: ExperimentConfig) -> Method:
    return METHODS[config.method]


__all__ = ["METHODS", "Candidates", "Method", "Terms", "method_of"]
