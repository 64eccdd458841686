"""Quality-guided contrastive rationale distillation: equation (8), whose last term the judge takes on its own."""

from __future__ import annotations

from torch import Tensor

from qcrd_ray.config import LossConfig
from qcrd_ray.training.methods.base import Method, Terms, contrasted_rationales


def loss(weights: LossConfig, terms: Terms) -> Tensor:
    return weights.alpha_label * terms.label() + weights.alpha_contrastive * terms.contrastive()


METHOD = Method(contrasted_rationales, loss)
