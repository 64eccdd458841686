"""Attention of a decoder-only model in which the targets of a prompt share its keys and values.

All tokens of a pass lie in one row: the prompts, then the targets, each the longest first (packing.py). A prompt
attends to itself, a target to its prompt and to itself, its positions counted from the prompt on: just what it would
see behind a prompt of its own. Nothing else is computed, but for the little padding within a group of like length.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qcrd_ray.models.packing import LIKE, Group, flatten, from_heads, grouped, longest_first, to_heads
from qcrd_ray.models.student import Item

NAME = "qcrd_shared_prompts"
"""Of `attend` among the attention functions of transformers."""

LIKE_ON_GPU = 0.25
"""There a group costs the launches of its kernels, and padding next to nothing."""

NEVER = 2**30
"""A position after all others."""

BiasKey = tuple[str, int, int | None, torch.dtype]


@dataclass(frozen=True)
class Targets:
    """A group of targets with their prompts.

    Attributes:
        group: the tokens from which something is predicted: all but the last of each.
        places: [N], of their prompts among the prompts.
        prompt_lengths: [N].
    """

    group: Group
    places: Tensor
    prompt_lengths: list[int]


@dataclass
class Layout:
    """Where the tokens of a pass stand in its row.

    A target's first token is predicted from its prompt's last one.

    Attributes:
        ids, positions: [T].
        predicting: [sum of the targets' lengths], the place that predicts each token of each target, as given.
        prompts: groups of prompts, as they lie.
        all_prompts: the same as one group.
        targets: groups of targets, as they lie; those of one token need no place.
        layers_attended: how many layers have used this layout in the forward pass.
    """

    ids: Tensor
    positions: Tensor
    predicting: Tensor
    prompts: list[Group]
    all_prompts: Group
    targets: list[Targets]
    layers_attended: int = 0
    _biases: dict[BiasKey, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, items: Sequence[Item], device: torch.device) -> Layout:
        like = LIKE_ON_GPU if device.type == "cuda" else LIKE
        prompts = [item.prompt for item in items]
        inputs = [target[:-1] for item in items for target in item.targets]
        owner = [number for number, item in enumerate(items) for _ in item.targets]
        first, then = longest_first(prompts), [number for number in longest_first(inputs) if inputs[number]]
        rows = [*(prompts[n] for n in first), *(inputs[n] for n in then)]
        ends = list(itertools.accumulate(len(row) for row in rows))
        prompt_end = dict(zip(first, ends, strict=False))
        input_end = dict(zip(then, ends[len(first) :], strict=True))
        predicting = [
            [prompt_end[owner[n]] - 1, *range(input_end.get(n, 0) - len(own), input_end.get(n, 0))]
            for n, own in enumerate(inputs)
        ]
        behind = [0] * len(first) + [len(prompts[owner[n]]) for n in then]
        positions = [range(start, start + len(row)) for start, row in zip(behind, rows, strict=True)]

        lengths, place = [len(prompts[n]) for n in first], {n: at for at, n in enumerate(first)}
        left, targets = iter(then), []
        for group in grouped([len(inputs[n]) for n in then], device, like):
            places = [place[owner[n]] for n in itertools.islice(left, len(group.lengths))]
            targets.append(Targets(group, torch.tensor(places, device=device), [lengths[at] for at in places]))
        return cls(
            ids=flatten(rows, device),
            positions=flatten(positions, device),
            predicting=flatten(predicting, device),
            prompts=grouped(lengths, device, like),
            all_prompts=grouped(lengths, device, like=0.0)[0],
            targets=targets,
        )

    def prompt_bias(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What to add to the scores of a group of prompts; None where only what follows a token is hidden from it."""
        longest = self.prompts[number].longest
        if window is None or window >= longest:
            return None
        return self._bias(("prompts", number, window, dtype), [0], longest)

    def target_bias(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """What to add to the scores of a group of N targets: [N, 1, longest, longest prompt + longest]."""
        targets = self.targets[number]
        return self._bias(("targets", number, window, dtype), targets.prompt_lengths, targets.group.longest)

    def _bias(self, key: BiasKey, prompt_lengths: Sequence[int], longest: int) -> Tensor:
        """Made for the first layer, kept for the others. A padding stands behind all that is real, and is hidden so."""
        if key not in self._biases:
            _, _, window, dtype = key
            behind = torch.tensor(prompt_lengths)[:, None]
            looking = behind + torch.arange(longest)  # [N, L]
            of_prompt = torch.arange(max(prompt_lengths)).expand(len(prompt_lengths), -1)
            seen = torch.cat([torch.where(of_prompt < behind, of_prompt, NEVER), looking], dim=1)
            distance = looking[:, :, None] - seen[:, None]
            hidden = (distance < 0) | (distance >= (NEVER if window is None else window))
            bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, float("-inf"))
            self._biases[key] = bias.unsqueeze(1).to(self.ids.device)
        return self._biases[key]


def attend_by_layout(model: Any) -> None:
    """Let a model of transformers attend by the `shared_prompts` that its forward is given."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    shared_prompts: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over the row of a layout; without one, transformers' own.

    Args:
        query: [1, heads, T, d].
        key, value: [1, heads of keys, T, d].
        dropout: of the weights.
        sliding_window: how many tokens a token sees, with itself; None: all before it.

    Returns:
        [1, T, heads, d], and nothing.
    """
    if shared_prompts is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    layout, dtype = shared_prompts, query.dtype
    layout.layers_attended += 1
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    sizes = [layout.all_prompts.tokens, sum(targets.group.tokens for targets in layout.targets)]
    of_prompts, of_targets = zip(*(_split(states, sizes) for states in (query, key, value)), strict=True)

    attended = []
    for number, (q, k, v) in enumerate(_batches(of_prompts, layout.prompts)):
        bias = layout.prompt_bias(number, sliding_window, dtype)
        attended.append(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, **options))
    result = [from_heads(attended, layout.prompts)]
    if layout.targets:
        [shared] = _batches(of_prompts[1:], [layout.all_prompts])
        groups, attended = [targets.group for targets in layout.targets], []
        for number, (q, *own) in enumerate(_batches(of_targets, groups)):
            targets = layout.targets[number]
            before = max(targets.prompt_lengths)
            k, v = (
                torch.cat([states[:, :, :before].index_select(0, targets.places), of_target], dim=2)
                for states, of_target in zip(shared, own, strict=True)
            )
            bias = layout.target_bias(number, sliding_window, dtype)
            attended.append(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **options))
        result.append(from_heads(attended, groups))
    return torch.cat(result).view(1, query.shape[2], query.shape[1], -1), None


def _split(states: Tensor, sizes: Sequence[int]) -> tuple[tuple[Tensor, int], ...]:
    """[1, heads, T, d] -> [size, heads * d] of each of the sizes, which add up to T; the number of heads with it."""
    rows = states.squeeze(0).transpose(0, 1).flatten(1)
    return tuple((part, states.shape[1]) for part in rows.split(list(sizes)))


def _batches(parts: Sequence[tuple[Tensor, int]], groups: Sequence[Group]) -> list[tuple[Tensor, ...]]:
    """Of each group all parts, each as [sequences, heads, longest, d]."""
    return list(zip(*(to_heads(heads, rows, groups) for rows, heads in parts), strict=True))
