"""T5's computation over the real tokens of many sequences: nothing is padded but what attention looks at.

The tokens of all sequences lie one after another (packing.py), and go through transformers' own modules like that. All
targets of a prompt share the keys and values of its encoder states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qcrd_ray.models.packing import LEAST, Group, flatten, from_heads, grouped, longest_first, padding_bias, to_heads


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
    order = longest_first(prompts)
    lengths = [len(prompts[n]) for n in order]
    groups = grouped(lengths, device)
    bias: list[Tensor] = []
    hidden = stack.dropout(stack.embed_tokens(flatten([prompts[n] for n in order], device)))
    for block in stack.block:
        attention = block.layer[0].SelfAttention
        if attention.has_relative_attention_bias:
            whole = attention.compute_bias(lengths[0], lengths[0])
            bias = [whole[:, :, : g.longest, : g.longest] + padding_bias(g.lengths, device) for g in groups]

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
    order = longest_first(targets)
    lengths = [len(targets[n]) for n in order]
    groups = grouped(lengths, device)
    place = {prompt: at for at, prompt in enumerate(encoded.order)}
    owners = torch.tensor([place[owner[n]] for n in order], device=device)
    [prompts] = grouped(encoded.lengths, device, like=0.0)
    hidden_prompt = (
        padding_bias(encoded.lengths, device).index_select(0, owners).split([len(g.lengths) for g in groups])
    )
    start = model.config.decoder_start_token_id
    inputs = flatten([[start, *targets[n][:-1]] for n in order], device)
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


def _self_attention(layer: Any, hidden: Tensor, groups: Sequence[Group], biases: Sequence[Tensor]) -> Tensor:
    attention, normed = layer.SelfAttention, layer.layer_norm(hidden)
    query, key, value = (
        to_heads(attention.n_heads, product(normed), groups) for product in (attention.q, attention.k, attention.v)
    )
    found = [_attend(attention, *parts) for parts in zip(query, key, value, biases, strict=True)]
    return hidden + layer.dropout(attention.o(from_heads(found, groups)))


def _cross_attention(
    layer: Any,
    hidden: Tensor,
    groups: Sequence[Group],
    states: Tensor,
    prompts: Group,
    owners: Tensor,
    biases: Sequence[Tensor],
) -> Tensor:
    attention, normed = layer.EncDecAttention, layer.layer_norm(hidden)
    query = to_heads(attention.n_heads, attention.q(normed), groups)
    sizes = [len(group.lengths) for group in groups]
    key, value = (
        to_heads(attention.n_heads, product(states), [prompts])[0].index_select(0, owners).split(sizes)
        for product in (attention.k, attention.v)
    )
    found = [_attend(attention, *parts) for parts in zip(query, key, value, biases, strict=True)]
    return hidden + layer.dropout(attention.o(from_heads(found, groups)))


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """[N, heads, L, d_kv], twice [N, heads, S, d_kv], a bias that fits [N, heads, L, S] -> [N, heads, L, d_kv]."""
    dropout, bias = attention.dropout if attention.training else 0.0, bias.to(query.dtype)
    if query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=1.0)
    # On a CPU, attention with a bias that learns is a product of matrices there too, by way of slower ones.
    weights = (query @ key.transpose(2, 3) + bias).softmax(-1)
    return F.dropout(weights, dropout, attention.training) @ value
