"""Decoder-only students (Llama, Qwen and their like): a prompt and its targets in one packed row.

A row reads `prompt, target 1, target 2, …`. A token sees the prompt and what comes before it in its own target; its
position counts as if its target followed the prompt directly. So each target's tokens are computed as they would be
behind a prompt of their own, and the prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        return len(items) * max(_row_length(item) for item in items)

    def forward(self, items: Sequence[Item], peaks_of: Sequence[int] | None = None) -> Tensor | tuple[Tensor, Tensor]:
        device = self.device
        length = max(_row_length(item) for item in items)
        ids = torch.full((len(items), length), self.tokenizer.pad)
        position = torch.zeros((len(items), length), dtype=torch.long)
        segment = torch.full((len(items), length), PADDING)
        # For each predicted token: where its prediction stands in the flattened rows, and the token.
        source: list[int] = []
        wanted: list[int] = []
        for row, item in enumerate(items):
            prompt = len(item.prompt)
            ids[row, :prompt] = torch.tensor(list(item.prompt))
            position[row, :prompt] = torch.arange(prompt)
            segment[row, :prompt] = PROMPT
            at = prompt
            for index, target in enumerate(item.targets, start=1):
                inputs = len(target) - 1
                ids[row, at : at + inputs] = torch.tensor(list(target[:-1]), dtype=torch.long)
                position[row, at : at + inputs] = torch.arange(prompt, prompt + inputs)
                segment[row, at : at + inputs] = index
                base = row * length
                source.append(base + prompt - 1)
                source.extend(range(base + at, base + at + inputs))
                wanted.extend(target)
                at += inputs
        hidden = self.model.model(
            input_ids=ids.to(device),
            position_ids=position.to(device),
            attention_mask=_block_mask(segment).to(device),
            use_cache=False,
        ).last_hidden_state
        picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, torch.tensor(source, device=device))
        tokens = torch.tensor(wanted, device=device)
        lengths = [len(target) for item in items for target in item.targets]
        return losses_of_targets(self.model.lm_head, picked, tokens, lengths, peaks_of)


def _row_length(item: Item) -> int:
    return len(item.prompt) + sum(len(target) - 1 for target in item.targets)


def _block_mask(segment: Tensor) -> Tensor:
    """True where a query may look: [B, 1, S, S] from the segments [B, S].

    A padding query looks at itself, so that no row of the softmax is empty.
    """
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    key, query = segment.unsqueeze(1), segment.unsqueeze(2)
    visible = causal & ((key == PROMPT) | (key == query)) & (key != PADDING) & (query != PADDING)
    return (visible | torch.eye(length, dtype=torch.bool)).unsqueeze(1)
