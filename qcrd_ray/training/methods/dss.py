"""Distilling step-by-step (Hsieh et al. 2023): the label and the teacher's first rationale, as two tasks."""

from __future__ import annotations

from torch import Tensor

from qcrd_ray.config import LossConfig
from qcrd_ray.training.methods.base import Method, Terms, first_rationale


def loss(weights: LossConfig, terms: Terms) -> Tensor:
    return weights.alpha_label * terms.label() + weights.alpha_contrastive * terms.rationale()


METHOD = Method(first_rationale, loss)
