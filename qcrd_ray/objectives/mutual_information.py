"""The auxiliary loss of Chen et al. 2024, "Learning to Maximize Mutual Information for Chain-of-Thought Distillation".

The paper bounds the mutual information of label and rationale by a cross-entropy between what the student predicts for
the two tasks. Its published code takes, for every word of the vocabulary, the highest probability that any position
gives it, once over the label's positions (the target, not differentiated) and once over the rationale's, and hands both
to a cross-entropy that reads the second as logits. That, and its weight of a tenth, is what is computed here, so that
`mi` is the baseline that others report. The one deviation: positions of padding take no part in the maximum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mutual_information_loss(
    rationale_logits: Tensor,
    label_logits: Tensor,
    rationale_mask: Tensor,
    label_mask: Tensor,
    *,
    weight: float = 0.1,
    questions: int | None = None,
) -> Tensor:
    """weight · the mean over B questions of -Σ_v q_v log softmax(p)_v, p and q the highest probabilities of word v.

    A question without a valid position on either side adds a 0 that is part of the graph. Logits outside a mask may
    hold anything, NaN too, and get a gradient of exactly 0; the label's logits never get one.

    Args:
        rationale_logits: [B, T, V], teacher-forced logits of the rationale task.
        label_logits: [B, L, V], those of the label task.
        rationale_mask, label_mask: [B, T], [B, L] bool, positions that are real.
        weight: factor on the mean; 0.1 in the published code.
        questions: divisor of the sum, default B; with the questions over all ranks the results of the ranks add up.

    Returns:
        A float32 scalar (float64 for float64 logits).

    Raises:
        ValueError: shapes that do not fit, a mask that is not bool, `questions` below 1.
    """
    if rationale_logits.ndim != 3 or label_logits.ndim != 3 or rationale_logits.shape[::2] != label_logits.shape[::2]:
        raise ValueError(
            "rationale_logits, label_logits: expected shapes [B, T, V] and [B, L, V] of one B and V, found "
            f"{tuple(rationale_logits.shape)} and {tuple(label_logits.shape)}"
        )
    for name, mask, logits in (
        ("rationale_mask", rationale_mask, rationale_logits),
        ("label_mask", label_mask, label_logits),
    ):
        if mask.shape != logits.shape[:2]:
            raise ValueError(f"{name}: expected shape {tuple(logits.shape[:2])}, found {tuple(mask.shape)}")
        if mask.dtype != torch.bool:
            raise ValueError(f"{name}: expected dtype torch.bool, found {mask.dtype}")
    if questions is not None and questions < 1:
        raise ValueError(f"questions: expected at least 1, found {questions}")

    both = rationale_mask.any(dim=1) & label_mask.any(dim=1)
    predicted = _highest_probability(rationale_logits, rationale_mask)
    target = _highest_probability(label_logits.detach(), label_mask)
    parts = torch.where(both, -(target * F.log_softmax(predicted, dim=-1)).sum(dim=-1), 0.0)
    divisor = max(rationale_logits.shape[0], 1) if questions is None else questions
    return weight * parts.sum() / divisor


def _highest_probability(logits: Tensor, mask: Tensor) -> Tensor:
    """Highest probability of each word over the valid positions, 0 without one: [B, T, V], [B, T] -> [B, V]."""
    if logits.shape[1] == 0:
        return logits.sum(dim=1)
    if logits.dtype != torch.float64:
        logits = logits.float()
    valid = mask[:, :, None]
    probability = torch.where(valid, logits, 0.0).softmax(dim=-1)  # the gradient of a softmax over NaN is NaN
    return torch.where(valid, probability, 0.0).amax(dim=1)
