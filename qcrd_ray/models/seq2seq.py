"""Encoder-decoder students (the T5 family): the encoder runs once a prompt, its states serve all its targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcrd_ray.models import packed_t5
from qcrd_ray.models.student import Item, Student, losses_of_targets
from qcrd_ray.sampling.engine import T5_FAMILY
from qcrd_ray.tasks.prompts import StudentTokenizer


class Seq2SeqStudent(Student):
    is_seq2seq = True

    def __init__(self, model: Any, tokenizer: StudentTokenizer) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    def padded_tokens(self, items: Sequence[Item]) -> int:
        if self._is_packed:
            return sum(item.size for item in items)
        longest = max((len(target) for item in items for target in item.targets), default=0)
        prompts = len(items) * max(len(item.prompt) for item in items)
        return prompts + sum(len(item.targets) for item in items) * longest

    def forward(self, items: Sequence[Item], peaks_of: Sequence[int] | None = None) -> Tensor | tuple[Tensor, Tensor]:
        targets = [target for item in items for target in item.targets]
        owner = [number for number, item in enumerate(items) for _ in item.targets]
        prompts = [item.prompt for item in items]
        if not self._is_packed:
            hidden, tokens = self._padded(prompts, targets, owner)
            return losses_of_targets(self._head, hidden, tokens, [len(target) for target in targets], peaks_of)
        found = packed_t5.decode(self.model, packed_t5.encode(self.model, prompts), targets, owner)
        tokens = torch.tensor([token for n in found.order for token in targets[n]], device=self.device)
        place = {number: at for at, number in enumerate(found.order)}
        back = torch.tensor([place[number] for number in range(len(targets))], device=self.device)
        wanted = None if peaks_of is None else [place[number] for number in peaks_of]
        losses = losses_of_targets(self._head, found.states, tokens, found.lengths, wanted)
        if isinstance(losses, Tensor):
            return losses.index_select(0, back)
        return losses[0].index_select(0, back), losses[1]

    @property
    def _is_packed(self) -> bool:
        return self.model.config.model_type in T5_FAMILY

    def _head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(hidden * packed_t5.output_scale(self.model.config))
        bias = getattr(self.model, "final_logits_bias", None)  # BART's
        return logits if bias is None else logits + bias

    def _padded(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], owner: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The states [T, d] that predict the targets' tokens, and the tokens, by any encoder-decoder's own forward."""
        device, pad = self.device, self.tokenizer.pad
        prompt_ids, prompt_mask = _pad(prompts, pad, device)
        states = self.model.get_encoder()(input_ids=prompt_ids, attention_mask=prompt_mask).last_hidden_state
        owners = torch.tensor(owner, device=device)
        target_ids, target_mask = _pad(targets, pad, device)
        start = torch.full_like(target_ids[:, :1], self.model.config.decoder_start_token_id)
        decoded = self.model.get_decoder()(
            input_ids=torch.cat([start, target_ids[:, :-1]], dim=1),
            encoder_hidden_states=states if len(targets) == len(prompts) else states.index_select(0, owners),
            encoder_attention_mask=prompt_mask.index_select(0, owners),
            use_cache=False,
        ).last_hidden_state
        real = target_mask.bool()
        return decoded[real], target_ids[real]


def _pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids [N, T] and mask [N, T] of 0 and 1."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return ids, mask
