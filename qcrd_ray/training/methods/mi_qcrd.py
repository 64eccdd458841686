"""QCRD, and the mutual information of the label and the positives that it takes (appendix A.4 of the paper)."""

from __future__ import annotations

from torch import Tensor

from qcrd_ray.config import LossConfig
from qcrd_ray.training.methods import qcrd
from qcrd_ray.training.methods.base import Method, Terms, contrasted_rationales


def loss(weights: LossConfig, terms: Terms) -> Tensor:
    return qcrd.loss(weights, terms) + weights.alpha_mutual_information * terms.mutual_information()


METHOD = Method(contrasted_rationales, loss)
