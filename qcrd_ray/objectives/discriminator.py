"""The discriminator's loss, equation (2)."""

from __future__ import annotations

import torch
from torch import Tensor


def discriminator_loss(
    positive_score: Tensor,
    negative_score: Tensor,
    positive_mask: Tensor,
    negative_mask: Tensor,
    *,
    questions: int | None = None,
) -> Tensor:
    """Equation (2): the mean over questions of -log(Σ exp s⁺ / Σ exp s⁻).

    The mean is over the questions that have a valid rationale on both sides; where none has, the loss is a 0 that is
    part of the graph. Entries outside a mask may hold anything, NaN too, and get a gradient of exactly 0.

    Args:
        positive_score, negative_score: [B, m], [B, k] in [0, 1]; m and k may be 0.
        positive_mask, negative_mask: [B, m], [B, k] bool, which entries are real.
        questions: divisor of the sum, default the number of questions with both sides. Given that number over all
            ranks, the results of all ranks add up to the loss of the whole batch.

    Returns:
        A scalar in the dtype of the scores.

    Raises:
        ValueError: shapes that do not fit, a mask that is not bool, `questions` below 1.
    """
    if positive_score.ndim != 2 or negative_score.ndim != 2 or positive_score.shape[0] != negative_score.shape[0]:
        raise ValueError(
            "positive_score, negative_score: expected shapes [B, m] and [B, k] of one B, found "
            f"{tuple(positive_score.shape)} and {tuple(negative_score.shape)}"
        )
    for name, mask, score in (
        ("positive_mask", positive_mask, positive_score),
        ("negative_mask", negative_mask, negative_score),
    ):
        if mask.shape != score.shape:
            raise ValueError(f"{name}: expected shape {tuple(score.shape)}, found {tuple(mask.shape)}")
        if mask.dtype != torch.bool:
            raise ValueError(f"{name}: expected dtype torch.bool, found {mask.dtype}")
    if questions is not None and questions < 1:
        raise ValueError(f"questions: expected at least 1, found {questions}")

    both = questions_with_both(positive_mask, negative_mask)
    parts = _log_sum_exp(negative_score, negative_mask, both) - _log_sum_exp(positive_score, positive_mask, both)
    total = torch.where(both, parts, 0.0).sum()
    divisor = both.sum().clamp(min=1) if questions is None else questions
    return total / divisor


def questions_with_both(positive_mask: Tensor, negative_mask: Tensor) -> Tensor:
    """Which questions equation (2) is defined for: [B, m], [B, k] bool -> [B] bool."""
    return positive_mask.any(dim=1) & negative_mask.any(dim=1)


def _log_sum_exp(score: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    """log Σ exp over the valid entries of the rows in `rows`; 0 or a harmless number in the others: [B, n] -> [B]."""
    if score.shape[1] == 0:
        return score.sum(dim=1)
    # Rows that do not count hold zeros, not -inf: the gradient of a log Σ exp of nothing is NaN.
    return torch.where(rows[:, None], torch.where(mask, score, -torch.inf), 0.0).logsumexp(dim=1)
