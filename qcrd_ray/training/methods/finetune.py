"""Fine-tuning: the label alone."""

from __future__ import annotations

from torch import Tensor

from qcrd_ray.config import LossConfig
from qcrd_ray.training.methods.base import Method, Terms, no_rationales


def loss(weights: LossConfig, terms: Terms) -> Tensor:
    return weights.alpha_label * terms.label()


METHOD = Method(no_rationales, loss)
