"""Decoder-only students (Llama, Qwen and their like): a prompt is computed once for all its targets.

The tokens of a pass go through transformers' own model in one row (shared_prompts.py), in which a token sees its own
prompt and what comes before it in its own target, as if the prompt stood before each of its targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcrd_ray.errors import UserError
from qcrd_ray.models.packing import flatten
from qcrd_ray.models.shared_prompts import Layout, attend_by_layout
from qcrd_ray.models.student import Item, Student, losses_of_targets
from qcrd_ray.tasks.prompts import StudentTokenizer


class CausalStudent(Student):
    is_seq2seq = False

    def __init__(self, model: Any, tokenizer: StudentTokenizer) -> None:
        """
        Args:
            model: its attention is replaced by one that knows layouts, and is transformers' own without one.
        """
        super().__init__()
        attend_by_layout(model)
        self.model = model
        self.tokenizer = tokenizer

    def padded_tokens(self, items: Sequence[Item]) -> int:
        return sum(len(item.prompt) + sum(len(target) - 1 for target in item.targets) for item in items)

    def forward(self, items: Sequence[Item], peaks_of: Sequence[int] | None = None) -> Tensor | tuple[Tensor, Tensor]:
        layout, layers = Layout.of(items, self.device), self.model.config.num_hidden_layers
        hidden = self.model.model(
            input_ids=layout.ids.unsqueeze(0),
            position_ids=layout.positions.unsqueeze(0),
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device),  # so that none is made
            use_cache=False,
            shared_prompts=layout,
        ).last_hidden_state
        if layout.layers_attended != layers:
            raise UserError(
                f"student.model: {type(self.model).__name__}: {layout.layers_attended} of {layers} layers attend by "
                "the function that transformers was given; in the others, targets of one prompt would see each other. "
                "Expected: a decoder-only model all of whose layers attend"
            )
        picked = hidden.squeeze(0).index_select(0, layout.predicting)
        targets = [target for item in items for target in item.targets]
        tokens = flatten(targets, self.device)
        return losses_of_targets(self.model.lm_head, picked, tokens, [len(target) for target in targets], peaks_of)
