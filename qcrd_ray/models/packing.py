"""Sequences of very different lengths without padding: all their tokens lie one after another, [T, n].

Every product over tokens runs over these. Only attention has to know where a sequence begins: it sees groups of
sequences of like length, each as a padded batch. The longest come first, so that those of like length lie together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LIKE = 0.75
"""Sequences at least this share as long as the longest of a group are computed with it."""

LEAST = -1e9
"""Added to the score of what must not be attended to."""


@dataclass(frozen=True)
class Group:
    """Sequences of like length, which lie together, as the rows of a padded batch.

    Attributes:
        lengths: of the sequences.
        padded: [sequences * longest], the token of the group at each place of the batch; any one in the padding.
        real: [tokens], where the group's tokens stand in the flattened batch.
    """

    lengths: list[int]
    padded: Tensor
    real: Tensor

    @property
    def longest(self) -> int:
        return self.lengths[0]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def longest_first(rows: Sequence[Sequence[int]]) -> list[int]:
    return sorted(range(len(rows)), key=lambda n: (-len(rows[n]), n))


def flatten(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor([token for row in rows for token in row], device=device)


def grouped(lengths: Sequence[int], device: torch.device, like: float = LIKE) -> list[Group]:
    """Args: lengths: the longest first."""
    together: list[list[int]] = []
    for length in lengths:
        if together and length >= like * together[-1][0]:
            together[-1].append(length)
        else:
            together.append([length])
    groups = []
    for own in together:
        longest, start = own[0], 0
        padded: list[int] = []
        real: list[int] = []
        for row, length in enumerate(own):
            padded += [*range(start, start + length), *[start] * (longest - length)]
            real += range(row * longest, row * longest + length)
            start += length
        groups.append(Group(own, torch.tensor(padded, device=device), torch.tensor(real, device=device)))
    return groups


def padding_bias(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[N, 1, 1, longest]: what to add to the scores so that the padding is not attended to."""
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.where(real, 0.0, LEAST)[:, None, None].to(device)


def to_heads(heads: int, flat: Tensor, groups: Sequence[Group]) -> list[Tensor]:
    """[T, heads * d] -> of each group [sequences, heads, longest, d]."""
    found = []
    for group, part in zip(groups, flat.split([group.tokens for group in groups]), strict=True):
        rows = part if group.tokens == len(group.padded) else _Pad.apply(part, group.padded, group.real)
        found.append(rows.view(len(group.lengths), group.longest, heads, -1).transpose(1, 2))
    return found


def from_heads(batches: Sequence[Tensor], groups: Sequence[Group]) -> Tensor:
    """The way back of `to_heads`."""
    found = []
    for group, batch in zip(groups, batches, strict=True):
        rows = batch.transpose(1, 2).flatten(2).flatten(0, 1)
        found.append(rows if group.tokens == len(group.padded) else _Unpad.apply(rows, group.real))
    return found[0] if len(found) == 1 else torch.cat(found)


class _Pad(torch.autograd.Function):
    """`flat[padded]`. What stands in the padding passes no gradient back, so that the way back is a gather, too."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, padded: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(real)
        return flat.index_select(0, padded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """`batch[real]`. No place is taken twice, so that the way back is a copy."""

    @staticmethod
    def forward(ctx: Any, batch: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(real)
        ctx.places = batch.shape[0]
        return batch.index_select(0, real)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        [gradient] = gradients
        whole = gradient.new_zeros(ctx.places, *gradient.shape[1:])
        return whole.index_copy_(0, ctx.saved_tensors[0], gradient), None
