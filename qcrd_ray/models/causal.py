"""Decoder-only students (Llama, Qwen and their like): prompts and their targets packed into rows.

A row reads `prompt, target 1, target 2, …`, for one prompt after another until it is full. A token sees its own prompt
and what comes before it in its own target; its position counts as if its target followed the prompt directly. So each
target's tokens are computed as they would be behind a prompt of their own, and the prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcrd_ray.models.student import Item, Student, losses_of_targets
from qcrd_ray.tasks.prompts import StudentTokenizer

PROMPT = 0
PADDING = -1


class CausalStudent(Student):
    is_seq2seq = False

    def __init__(self, model: Any, tokenizer: StudentTokenizer) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    def padded_tokens(self, items: Sequence[Item]) -> int:
        rows = _rows([_length(item) for item in items])
        return len(rows) * max(_length(item) for item in items)

    def forward(self, items: Sequence[Item], peaks_of: Sequence[int] | None = None) -> Tensor | tuple[Tensor, Tensor]:
        device = self.device
        lengths = [_length(item) for item in items]
        rows, width = _rows(lengths), max(lengths)
        ids = torch.full((len(rows), width), self.tokenizer.pad)
        position = torch.zeros((len(rows), width), dtype=torch.long)
        owner = torch.full((len(rows), width), PADDING)
        segment = torch.full((len(rows), width), PROMPT)
        source: list[list[int]] = [[] for _ in items]
        for row, numbers in enumerate(rows):
            at = 0
            for number in numbers:
                item, end = items[number], at + lengths[number]
                found = _Laid.out(item)
                ids[row, at:end] = torch.tensor(found.ids)
                position[row, at:end] = torch.tensor(found.positions)
                segment[row, at:end] = torch.tensor(found.segments)
                owner[row, at:end] = number
                source[number] = [row * width + at + place for place in found.predicting]
                at = end
        hidden = self.model.model(
            input_ids=ids.to(device),
            position_ids=position.to(device),
            attention_mask=_block_mask(owner, segment).to(device),
            use_cache=False,
        ).last_hidden_state
        places = torch.tensor([place for of_item in source for place in of_item], device=device)
        picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, places)
        targets = [target for item in items for target in item.targets]
        tokens = torch.tensor([token for target in targets for token in target], device=device)
        return losses_of_targets(self.model.lm_head, picked, tokens, [len(target) for target in targets], peaks_of)


@dataclass(frozen=True)
class _Laid:
    """An item in a row of its own: token ids, positions, segments (the prompt, target 1, target 2, …).

    Attributes:
        predicting: for each token of each target, where the state that predicts it stands.
    """

    ids: list[int]
    positions: list[int]
    segments: list[int]
    predicting: list[int]

    @classmethod
    def out(cls, item: Item) -> _Laid:
        prompt = len(item.prompt)
        laid = cls(list(item.prompt), list(range(prompt)), [PROMPT] * prompt, [])
        for number, target in enumerate(item.targets, start=1):
            at, inputs = len(laid.ids), len(target) - 1  # nothing is predicted from a target's last token
            laid.ids.extend(target[:-1])
            laid.positions.extend(range(prompt, prompt + inputs))
            laid.segments.extend([number] * inputs)
            laid.predicting.extend([prompt - 1, *range(at, at + inputs)])
        return laid


def _length(item: Item) -> int:
    return len(item.prompt) + sum(len(target) - 1 for target in item.targets)


def _rows(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of items by row, none longer than the longest item: the longest first, into the first row with room."""
    capacity = max(lengths)
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        row = next((row for row, left in enumerate(room) if left >= lengths[number]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(number)
        room[row] -= lengths[number]
    return rows


def _block_mask(owner: Tensor, segment: Tensor) -> Tensor:
    """True where a query may look: [B, 1, S, S] from the item and the segment of each token, [B, S].

    A padding query looks at itself, so that no row of the softmax is empty.
    """
    length = owner.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    own = (owner.unsqueeze(1) == owner.unsqueeze(2)) & (owner != PADDING).unsqueeze(2)
    seen = (segment == PROMPT).unsqueeze(1) | (segment.unsqueeze(1) == segment.unsqueeze(2))
    return ((causal & own & seen) | torch.eye(length, dtype=torch.bool)).unsqueeze(1)
