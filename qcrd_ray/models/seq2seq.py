"""Encoder-decoder students (the T5 family): the encoder runs once a prompt, its states serve all its targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcrd_ray.models.student import Item, Student, losses_of_targets
from qcrd_ray.tasks.prompts import StudentTokenizer


class Seq2SeqStudent(Student):
    is_seq2seq = True

    def __init__(self, model: Any, tokenizer: StudentTokenizer) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    def padded_tokens(self, items: Sequence[Item]) -> int:
        longest = max((len(target) for item in items for target in item.targets), default=0)
        prompts = len(items) * max(len(item.prompt) for item in items)
        return prompts + sum(len(item.targets) for item in items) * longest

    def forward(self, items: Sequence[Item], peaks_of: Sequence[int] | None = None) -> Tensor | tuple[Tensor, Tensor]:
        device = self.device
        pad = self.tokenizer.pad
        prompt_ids, prompt_mask = _pad([item.prompt for item in items], pad, device)
        states = self.model.get_encoder()(input_ids=prompt_ids, attention_mask=prompt_mask).last_hidden_state

        targets = [target for item in items for target in item.targets]
        owner = torch.tensor([p for p, item in enumerate(items) for _ in item.targets], device=device)
        target_ids, target_mask = _pad(targets, pad, device)
        start = torch.full_like(target_ids[:, :1], self.model.config.decoder_start_token_id)
        decoder_ids = torch.cat([start, target_ids[:, :-1]], dim=1)
        shared = states if len(targets) == len(items) else states.index_select(0, owner)
        decoded = self.model.decoder(
            input_ids=decoder_ids,
            encoder_hidden_states=shared,
            encoder_attention_mask=prompt_mask.index_select(0, owner),
            use_cache=False,
        ).last_hidden_state
        real = target_mask.bool()
        hidden = decoded[real]
        if getattr(self.model.config, "scale_decoder_outputs", False):
            hidden = hidden * self.model.model_dim**-0.5
        lengths = [len(target) for target in targets]
        return losses_of_targets(self.model.lm_head, hidden, target_ids[real], lengths, peaks_of)


def _pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids [N, T] and mask [N, T] of 0 and 1."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return ids, mask
