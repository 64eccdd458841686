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

    parts = [
        cross_entropy_of_peaks(peak_of(rationale[real]), peak_of(label[stated]))
        for rationale, label, real, stated in zip(
            rationale_logits, label_logits.detach(), rationale_mask, label_mask, strict=True
        )
        if real.any() and stated.any()
    ]
    nothing = wide(rationale_logits[:0]).sum()
    divisor = max(rationale_logits.shape[0], 1) if questions is None else questions
    return weight * (torch.stack(parts).sum() if parts else nothing) / divisor


def cross_entropy_of_peaks(rationale_peak: Tensor, label_peak: Tensor) -> Tensor:
    """-Σ_v q_v log softmax(p)_v of each question, p and q the highest probabilities that any position gives word v.

    Args:
        rationale_peak: [..., V], p, of the rationale task.
        label_peak: [..., V], q, of the label task; never differentiated.

    Returns:
        [...], in the dtype of the peaks.
    """
    return -(label_peak.detach() * F.log_softmax(rationale_peak, dim=-1)).sum(dim=-1)


def peak_of(logits: Tensor) -> Tensor:
    """Highest probability that any of T positions gives each word: [T, V], T >= 1 -> [V], float32 or float64."""
    return wide(logits).softmax(dim=-1).amax(dim=0)


def wide(logits: Tensor) -> Tensor:
    """In float32, so that a softmax over a vocabulary is one; float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()
