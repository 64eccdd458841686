"""Cross-entropy over a vocabulary, with little more in memory than the logits in the precision of the head.

A step's logits are its largest tensors. PyTorch's own way makes three more of their size, in float32. Here a few
tokens at a time are taken to float32, on a CPU so few that they stay in its cache, and the gradient takes the place of
the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qcrd_ray.objectives.mutual_information import wide

Head = Callable[[Tensor], Tensor]
"""From hidden states [T, d] to logits [T, V]."""

TOKENS_TOGETHER = 512
"""Whose logits are in memory at once where there are no gradients."""

IN_CACHE, ON_GPU = 2**20, 2**26
"""Numbers that are taken to float32 together."""


def token_cross_entropy(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(head(hidden))[target] for each token, float32 (float64 of a float64 head): [T, d], [T] -> [T].

    Without gradients the logits are made and dropped a few hundred tokens at a time, so that a choice among many
    rationales takes no more memory than one among few. With them, there can be one backward pass.
    """
    if torch.is_grad_enabled():
        found: Tensor = _CrossEntropy.apply(head(hidden), targets)
        return found
    parts = zip(hidden.split(TOKENS_TOGETHER), targets.split(TOKENS_TOGETHER), strict=True)
    return torch.cat([_values(head(part), wanted) for part, wanted in parts])


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        return _values(logits, targets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """softmax(logits) less 1 at the target, times the token's gradient, written over the logits."""
        logits, targets = ctx.saved_tensors
        rows = _rows(logits)
        for part, wanted, factor in zip(
            logits.split(rows), targets.split(rows), gradients[0].unsqueeze(1).split(rows), strict=True
        ):
            found = wide(part).softmax(1)
            found.scatter_add_(1, wanted.unsqueeze(1), torch.full_like(factor, -1.0))
            part.copy_(found.mul_(factor))
        return logits, None


def _values(logits: Tensor, targets: Tensor) -> Tensor:
    rows = _rows(logits)
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.cat([F.cross_entropy(wide(part), wanted, reduction="none") for part, wanted in parts])


def _rows(logits: Tensor) -> int:
    """Tokens that are taken together."""
    return max(1, (ON_GPU if logits.is_cuda else IN_CACHE) // logits.shape[1])
