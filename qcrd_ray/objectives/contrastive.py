"""The many-to-one contrastive distillation loss, equations (3) to (7), and the schemes of section 5.1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHOOSING_SCHEMES = ("min_max", "max_min", "sampling")
SCHEMES = (*CHOOSING_SCHEMES, "mean", "weighted_mean")


@dataclass(frozen=True)
class Choice:
    """Columns that the loss of each question is taken from; -1: none, and everywhere for the means."""

    positive: Tensor  # [B] int64
    negative: Tensor  # [B] int64


@dataclass(frozen=True)
class ContrastiveLoss:
    """`loss = positive - beta * negative`, all three scalars in the dtype of the cross-entropies, part of the graph."""

    loss: Tensor
    positive: Tensor
    negative: Tensor  # never above 0
    chosen_positive: Tensor  # [B] int64, -1: none
    chosen_negative: Tensor  # [B] int64, -1: none
    active_negatives: Tensor  # [B] bool: the chosen negative (for the means: any) lies inside the margin


def contrastive_loss(
    positive_ce: Tensor,
    negative_ce: Tensor,
    positive_mask: Tensor,
    negative_mask: Tensor,
    positive_score: Tensor | None = None,
    negative_score: Tensor | None = None,
    *,
    beta: float = 0.2,
    margin: float = 3.0,
    scheme: str = "min_max",
    uniforms: Tensor | None = None,
    questions: int | None = None,
    choice: Choice | None = None,
) -> ContrastiveLoss:
    """Equation (3) over a batch of B questions with up to m positive and k negative rationales each.

    A question's positive part is the cross-entropy of its chosen positive times that rationale's score s; its negative
    part is `min(ce - margin, 0)` of its chosen negative times 1 - s, equations (6) and (7). The means average over all
    valid rationales instead. A question without a valid rationale on a side adds a 0 to that side that is part of the
    graph. Entries outside a mask may hold anything, NaN too, and get a gradient of exactly 0. A valid NaN is not
    hidden: it is chosen and makes the loss NaN.

    Args:
        positive_ce, negative_ce: [B, m], [B, k] float, mean cross-entropy of a rationale in nats; m and k may be 0.
        positive_mask, negative_mask: [B, m], [B, k] bool, which entries are real.
        positive_score, negative_score: [B, m], [B, k] in [0, 1], the judge's scores, never differentiated; None: every
            weight of that side is 1. `mean` does not weigh.
        beta: weight of the negative part.
        margin: δ in nats; a negative at or above it is at rest: part 0, gradient 0.
        scheme: one of SCHEMES.
        uniforms: [B, 2] in [0, 1), for `sampling`: one draw a question for each side.
        questions: divisor of both sums, default B. Given the questions of the batch over all ranks, the result is this
            rank's share, and the shares of all ranks add up to the loss of the whole batch.
        choice: what `choose` gave, usually in a pass without dropout; None: chosen here, from these values. The means
            pay no heed to it.

    Raises:
        ValueError: shapes that do not fit, a mask that is not bool, an unknown scheme, `sampling` without uniforms and
            without a choice, `weighted_mean` without the scores of both sides, a choice of an entry that is not valid.
    """
    _check(positive_ce, negative_ce, positive_mask, negative_mask, scheme)
    _check_scores("positive_score", positive_score, positive_ce)
    _check_scores("negative_score", negative_score, negative_ce)
    if scheme == "weighted_mean" and (positive_score is None or negative_score is None):
        raise ValueError("scheme 'weighted_mean' needs positive_score and negative_score, found none")
    if questions is not None and questions < 1:
        raise ValueError(f"questions: expected at least 1, found {questions}")

    batch = positive_ce.shape[0]
    inside = negative_mask & ~(negative_ce.detach() >= margin)  # not `<`: a valid NaN has to reach the loss
    negative_hinge = torch.where(inside, negative_ce - margin, 0.0)
    positive_weight = _weights(positive_score, positive_ce, scheme)
    negative_weight = _weights(None if negative_score is None else 1.0 - negative_score, negative_ce, scheme)

    if scheme in CHOOSING_SCHEMES:
        if choice is None:
            choice = choose(positive_ce, negative_ce, positive_mask, negative_mask, scheme=scheme, uniforms=uniforms)
        else:
            _check_choice("positive", choice.positive, positive_mask)
            _check_choice("negative", choice.negative, negative_mask)
        positive_parts = _pick(positive_ce, choice.positive, positive_weight)
        negative_parts = _pick(negative_hinge, choice.negative, negative_weight)
        active = _pick(inside, choice.negative, None)
    else:
        choice = _no_choice(positive_ce)
        positive_parts = _masked_mean(positive_ce, positive_mask, positive_weight)
        negative_parts = _masked_mean(negative_hinge, negative_mask, negative_weight)
        active = inside.any(dim=1)

    divisor = max(batch, 1) if questions is None else questions
    positive = positive_parts.sum() / divisor
    negative = negative_parts.sum() / divisor
    return ContrastiveLoss(
        loss=positive - beta * negative,
        positive=positive,
        negative=negative,
        chosen_positive=choice.positive,
        chosen_negative=choice.negative,
        active_negatives=active,
    )


@torch.no_grad()
def choose(
    positive_ce: Tensor,
    negative_ce: Tensor,
    positive_mask: Tensor,
    negative_mask: Tensor,
    *,
    scheme: str,
    uniforms: Tensor | None = None,
) -> Choice:
    """The columns that the loss of each question is taken from, equations (4) and (5); no gradient.

    `min_max` takes the valid positive of the least and the valid negative of the greatest cross-entropy, `max_min` the
    other way round, ties at the lowest column; `sampling` takes the valid entry number floor(u · count). The margin has
    no say. The means choose nothing.

    Args:
        As in `contrastive_loss`; for `sampling`, the masks and `uniforms` [B, 2] (positive, negative) decide alone.

    Raises:
        ValueError: as in `contrastive_loss`.
    """
    _check(positive_ce, negative_ce, positive_mask, negative_mask, scheme)
    if scheme == "min_max":
        return Choice(_least(positive_ce, positive_mask), _least(-negative_ce, negative_mask))
    if scheme == "max_min":
        return Choice(_least(-positive_ce, positive_mask), _least(negative_ce, negative_mask))
    if scheme == "sampling":
        expected = (positive_ce.shape[0], 2)
        if uniforms is None:
            raise ValueError(f"scheme 'sampling' needs uniforms of shape {expected}, found none")
        if tuple(uniforms.shape) != expected:
            raise ValueError(f"uniforms: expected shape {expected}, found {tuple(uniforms.shape)}")
        uniforms = uniforms.to(positive_ce.device, torch.float64)
        if not bool(((uniforms >= 0) & (uniforms < 1)).all()):
            raise ValueError("uniforms: expected numbers in [0, 1)")
        return Choice(_drawn(uniforms[:, 0], positive_mask), _drawn(uniforms[:, 1], negative_mask))
    return _no_choice(positive_ce)


def _least(values: Tensor, mask: Tensor) -> Tensor:
    """First valid column of the least value (NaN counts as least) in each row, -1 where none is valid: [B] int64."""
    if mask.shape[1] == 0:
        return mask.new_full((mask.shape[0],), -1, dtype=torch.int64)
    least = torch.where(mask, values, torch.inf).amin(dim=1, keepdim=True)
    hit = mask & ((values == least) | (values.isnan() & least.isnan()))  # a valid inf must not lose to the filling
    return torch.where(mask.any(dim=1), hit.to(torch.int8).argmax(dim=1), -1)


def _drawn(uniform: Tensor, mask: Tensor) -> Tensor:
    """Column of the valid entry number floor(u * count) in each row, -1 where none is valid: [B] int64."""
    if mask.shape[1] == 0:
        return mask.new_full((mask.shape[0],), -1, dtype=torch.int64)
    count = mask.sum(dim=1)
    rank = torch.minimum((uniform * count).floor().to(torch.int64), count - 1)
    hit = mask & (mask.cumsum(dim=1) == rank[:, None] + 1)
    return torch.where(count > 0, hit.to(torch.int8).argmax(dim=1), -1)


def _no_choice(like: Tensor) -> Choice:
    nothing = torch.full((like.shape[0],), -1, dtype=torch.int64, device=like.device)
    return Choice(nothing, nothing.clone())


def _weights(score: Tensor | None, values: Tensor, scheme: str) -> Tensor | None:
    return None if score is None or scheme == "mean" else score.detach().to(values.dtype)


def _pick(values: Tensor, chosen: Tensor, weight: Tensor | None) -> Tensor:
    """weight · value of the chosen column of each row, 0 where none is chosen: [B, n] -> [B]."""
    if values.shape[1] == 0:
        return values.sum(dim=1).to(values.dtype)
    column = chosen.clamp(min=0)[:, None]
    picked = torch.where(chosen >= 0, values.gather(1, column)[:, 0], 0)
    if weight is not None:
        picked = picked * torch.where(chosen >= 0, weight.gather(1, column)[:, 0], 0)
    return picked.to(values.dtype)


def _masked_mean(values: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
    """Σ weight · value / count over the valid entries of each row, 0 where none is valid: [B, n] -> [B]."""
    kept = torch.where(mask, values, 0.0)
    if weight is not None:
        kept = kept * torch.where(mask, weight, 0.0)
    return kept.sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def _check(positive_ce: Tensor, negative_ce: Tensor, positive_mask: Tensor, negative_mask: Tensor, scheme: str) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, found {scheme!r}")
    if positive_ce.ndim != 2 or negative_ce.ndim != 2 or positive_ce.shape[0] != negative_ce.shape[0]:
        raise ValueError(
            "positive_ce, negative_ce: expected shapes [B, m] and [B, k] of one B, found "
            f"{tuple(positive_ce.shape)} and {tuple(negative_ce.shape)}"
        )
    for name, mask, values in (
        ("positive_mask", positive_mask, positive_ce),
        ("negative_mask", negative_mask, negative_ce),
    ):
        if mask.shape != values.shape:
            raise ValueError(f"{name}: expected shape {tuple(values.shape)}, found {tuple(mask.shape)}")
        if mask.dtype != torch.bool:
            raise ValueError(f"{name}: expected dtype torch.bool, found {mask.dtype}")


def _check_scores(name: str, score: Tensor | None, values: Tensor) -> None:
    if score is not None and score.shape != values.shape:
        raise ValueError(f"{name}: expected shape {tuple(values.shape)}, found {tuple(score.shape)}")


def _check_choice(side: str, chosen: Tensor, mask: Tensor) -> None:
    if tuple(chosen.shape) != (mask.shape[0],):
        raise ValueError(f"choice.{side}: expected shape {(mask.shape[0],)}, found {tuple(chosen.shape)}")
    outside = chosen >= mask.shape[1]
    if mask.shape[1]:
        column = chosen.clamp(0, mask.shape[1] - 1)[:, None]
        outside = outside | ((chosen >= 0) & ~mask.gather(1, column)[:, 0])
    if bool(outside.any()):
        row = int(outside.to(torch.int8).argmax())
        raise ValueError(f"choice.{side}: row {row} names column {int(chosen[row])}, which is no valid entry")
