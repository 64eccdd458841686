"""T5's computation over the real tokens of many sequences: nothing is padded but what attention looks at.

A pass holds prompts and targets of very different lengths. In a padded batch every product runs over the longest; here
the tokens of all sequences lie one after another, [T, d_model], and go through transformers' own modules like that.
Only attention needs to know where a sequence begins. The longest come first, so that sequences of like length lie
together, and are attended to together. All targets of a prompt share the keys and values of its encoder states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LIKE = 0.75
"""Sequences at least this share as long as the longest of a group are attended to with it."""

LEAST = -1e9
"""Added to the score of what must not be attended to."""


@dataclass(frozen=True)
class Packed:
    """Sequences one after another, the longest first.

    Attributes:
        states: [T, n].
        order: which of the given sequences stands at each place.
        lengths: of the sequences, as they stand.
    """

    states: Tensor
    order: list[int]
    lengths: list[int]


def encode(model: Any, prompts: Sequence[Sequence[int]]) -> Packed:
    """The encoder's last states of the prompts.

    Args:
        model: a T5, mT5 or UMT5 of transformers. Every weight is used through its module, so that whoever hooks
            modules (ZeRO-3, LoRA) sees each use.
    """
    stack, device = model.get_encoder(), model.device
    order = _longest_first(prompts)
    lengths = [len(prompts[n]) for n in order]
    groups = _groups(lengths, device)
    bias: list[Tensor] = []
    hidden = stack.dropout(stack.embed_tokens(_flat([prompts[n] for n in order], device)))
    for block in stack.block:
        attention = block.layer[0].SelfAttention
        if attention.has_relative_attention_bias:
            whole = attention.compute_bias(lengths[0], lengths[0])
            bias = [whole[:, :, : g.longest, : g.longest] + _padding(g.lengths, device) for g in groups]

        def run(hidden: Tensor, block: Any = block, bias: list[Tensor] = bias) -> Tensor:
            return block.layer[-1](_self_attention(block.layer[0], hidden, groups, bias))

        hidden = _run(stack, run, hidden)
    return Packed(stack.dropout(stack.final_layer_norm(hidden)), order, lengths)


def decode(model: Any, encoded: Packed, targets: Sequence[Sequence[int]], owner: Sequence[int]) -> Packed:
    """The decoder's last states that predict the tokens of the targets.

    Args:
        encoded: what `encode` gave.
        targets: at least one token each.
        owner: of each target, the number of its prompt as `encode` was given them.
    """
    stack, device = model.decoder, model.device
    order = _longest_first(targets)
    lengths = [len(targets[n]) for n in order]
    groups = _groups(lengths, device)
    place = {prompt: at for at, prompt in enumerate(encoded.order)}
    owners = torch.tensor([place[owner[n]] for n in order], device=device)
    [prompts] = _groups(encoded.lengths, device, like=0.0)
    hidden_prompt = _padding(encoded.lengths, device).index_select(0, owners).split([len(g.lengths) for g in groups])
    start = model.config.decoder_start_token_id
    inputs = _flat([[start, *targets[n][:-1]] for n in order], device)
    bias: list[Tensor] = []
    hidden = stack.dropout(stack.embed_tokens(inputs))
    for block in stack.block:
        attention = block.layer[0].SelfAttention
        if attention.has_relative_attention_bias:
            whole = attention.compute_bias(lengths[0], lengths[0])
            # A token of the padding stands behind all that is real, so that what is causal hides it.
            whole = whole + torch.full(whole.shape[-2:], LEAST, device=device).triu(1)
            bias = [whole[:, :, : g.longest, : g.longest] for g in groups]

        def run(hidden: Tensor, states: Tensor, block: Any = block, bias: list[Tensor] = bias) -> Tensor:
            hidden = _self_attention(block.layer[0], hidden, groups, bias)
            hidden = _cross_attention(block.layer[1], hidden, groups, states, prompts, owners, hidden_prompt)
            return block.layer[-1](hidden)

        hidden = _run(stack, run, hidden, encoded.states)
    return Packed(stack.dropout(stack.final_layer_norm(hidden)), order, lengths)


def output_scale(config: Any) -> float:
    """The factor that transformers puts before the output layer of any encoder-decoder."""
    scaled = {"t5": getattr(config, "scale_decoder_outputs", True), "umt5": config.tie_word_embeddings}
    return float(config.d_model**-0.5) if scaled.get(config.model_type, False) else 1.0


def _run(stack: Any, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    if stack.gradient_checkpointing and stack.training and torch.is_grad_enabled():
        found: Tensor = checkpoint(run, *inputs, use_reentrant=False)
        return found
    return run(*inputs)


def _self_attention(layer: Any, hidden: Tensor, groups: Sequence[_Group], biases: Sequence[Tensor]) -> Tensor:
    attention, normed = layer.SelfAttention, layer.layer_norm(hidden)
    query, key, value = (
        _heads(attention, product(normed), groups) for product in (attention.q, attention.k, attention.v)
    )
    found = [_attend(attention, *parts) for parts in zip(query, key, value, biases, strict=True)]
    return hidden + layer.dropout(attention.o(_packed(found, groups)))


def _cross_attention(
    layer: Any,
    hidden: Tensor,
    groups: Sequence[_Group],
    states: Tensor,
    prompts: _Group,
    owners: Tensor,
    biases: Sequence[Tensor],
) -> Tensor:
    attention, normed = layer.EncDecAttention, layer.layer_norm(hidden)
    query = _heads(attention, attention.q(normed), groups)
    sizes = [len(group.lengths) for group in groups]
    key, value = (
        _heads(attention, product(states), [prompts])[0].index_select(0, owners).split(sizes)
        for product in (attention.k, attention.v)
    )
    found = [_attend(attention, *parts) for parts in zip(query, key, value, biases, strict=True)]
    return hidden + layer.dropout(attention.o(_packed(found, groups)))


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """[N, heads, L, d_kv], twice [N, heads, S, d_kv], a bias that fits [N, heads, L, S] -> [N, heads, L, d_kv]."""
    dropout, bias = attention.dropout if attention.training else 0.0, bias.to(query.dtype)
    if query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=1.0)
    # On a CPU, attention with a bias that learns is a product of matrices there too, by way of slower ones.
    weights = (query @ key.transpose(2, 3) + bias).softmax(-1)
    return F.dropout(weights, dropout, attention.training) @ value


# From packed tokens to padded batches and back


@dataclass(frozen=True)
class _Group:
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


def _longest_first(rows: Sequence[Sequence[int]]) -> list[int]:
    return sorted(range(len(rows)), key=lambda n: (-len(rows[n]), n))


def _flat(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor([token for row in rows for token in row], device=device)


def _groups(lengths: Sequence[int], device: torch.device, like: float = LIKE) -> list[_Group]:
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
        groups.append(_Group(own, torch.tensor(padded, device=device), torch.tensor(real, device=device)))
    return groups


def _padding(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[N, 1, 1, longest]: what to add to the scores so that the padding is not attended to."""
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.where(real, 0.0, LEAST)[:, None, None].to(device)


def _heads(attention: Any, flat: Tensor, groups: Sequence[_Group]) -> list[Tensor]:
    """[T, heads * d_kv] -> of each group [sequences, heads, longest, d_kv]."""
    found = []
    for group, part in zip(groups, flat.split([group.tokens for group in groups]), strict=True):
        rows = part if group.tokens == len(group.padded) else _Pad.apply(part, group.padded, group.real)
        found.append(rows.view(len(group.lengths), group.longest, attention.n_heads, -1).transpose(1, 2))
    return found


def _packed(batches: Sequence[Tensor], groups: Sequence[_Group]) -> Tensor:
    """The way back of `_heads`."""
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
