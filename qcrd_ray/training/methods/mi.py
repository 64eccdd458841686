"""Distilling step-by-step, and the mutual information of its two tasks (Chen et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from qcrd_ray.config import LossConfig
from qcrd_ray.training.methods import dss
from qcrd_ray.training.methods.base import Method, Terms, first_rationale


def loss(weights: LossConfig, terms: Terms) -> Tensor:
    return dss.loss(weights, terms) + weights.alpha_mutual_information * terms.mutual_information()


METHOD = Method(first_rationale, loss)
