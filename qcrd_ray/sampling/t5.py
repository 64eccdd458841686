"""The fast engine for the T5 family: a decode loop of its own over the weights of transformers' modules.

What makes it fast, on a CPU above all:

* The keys and values of a prompt for the cross-attention of all layers are computed once, by one product.
* Queries, keys and values come from one product a layer, and so do both halves of a gated feed-forward.
* Attention of one query a sequence reads what each row has and no more, by a kernel on a CPU; elsewhere, and without a
  compiler, it is a batched product over contiguous memory. In bfloat16 on a CPU either takes a fraction of the time of
  `scaled_dot_product_attention`.
* A sequence that has ended makes room for the next one at once. T5 knows distances and no positions, so all rows write
  to the same slot of a ring of time steps, however long ago each of them began.
* Tokens are drawn for the whole batch by one call, each row with the next number of its own sequence's stream.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qcrd_ray.models.packed_t5 import output_scale
from qcrd_ray.sampling.cpu_attention import CpuAttention
from qcrd_ray.sampling.engine import T5_FAMILY, EngineSpec, Generation, Request, SamplingParameters
from qcrd_ray.sampling.transformers import SequenceState, TransformersEngine

ENCODED_TOGETHER = 16
"""Prompts that go through the encoder at once. They are of like length, so that little is padding."""

RING_STEP = 64
"""Time steps by which the cache of self-attention grows and shrinks."""

CHUNK = 32
"""Tokens of a chunk of the vocabulary, where the likeliest are looked for."""

LEAST = torch.finfo(torch.float32).min
"""Added to the score of what must not be attended to."""

SHRINK = 0.75
"""Share of rows, or of the prompts' width, at which the batch is copied into a smaller one."""

Attention = Callable[[int, Tensor], Tensor]
"""From a layer's number and its queries [rows, heads, d_kv] to what is attended to [rows, heads * d_kv]."""


class T5Engine(TransformersEngine):
    """A T5, mT5 or UMT5 on the CPU or a GPU.

    Weights are loaded as in `TransformersEngine`; the products that are computed together read the same memory.
    """

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        kind = self.model.config.model_type
        if kind not in T5_FAMILY:
            raise ValueError(f"engine t5 runs {', '.join(T5_FAMILY)}, not {kind} ({spec.model}): use transformers")
        self.network = _Network(self.model)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[list[Generation]]:
        if any(request.parameters.choices for request in requests):
            raise ValueError("engine t5 holds no text to choices; engine transformers does")
        results: list[list[Generation | None]] = [[None] * request.n for request in requests]
        # What is drawn by the same rule is drawn together.
        groups: dict[tuple[float, int, float], list[SequenceState]] = {}
        for index, request in enumerate(requests):
            asked = request.parameters
            group = groups.setdefault((asked.temperature, asked.top_k, asked.top_p), [])
            group += [SequenceState.of(request, (index, number)) for number in range(request.n)]
        for rule, sequences in groups.items():
            self._decode(sequences, _uniforms, functools.partial(_draw, *rule), self._take)
            for sequence in sequences:
                index, number = sequence.place
                results[index][number] = self._finish(sequence)
        return results  # type: ignore[return-value]

    def _take(self, sequence: SequenceState, token: int, logprob: float) -> None:
        sequence.logprob += logprob
        sequence.count += 1
        self._append(sequence, token)

    @torch.inference_mode()
    def target_logprobs(self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> list[list[float]]:
        found: list[list[float]] = [[] for _ in targets]
        sequences = []
        for index, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            if target:
                parameters = SamplingParameters(temperature=0.0, max_tokens=len(target))
                sequences.append(SequenceState.of(Request(tuple(prompt), parameters), (index, 0)))

        def take(sequence: SequenceState, token: int, logprob: float) -> None:
            values = found[sequence.place[0]]
            values.append(logprob)
            if len(values) == len(targets[sequence.place[0]]):
                sequence.finish_reason = "length"

        def forced(sequence: SequenceState) -> Tensor:
            return torch.tensor(list(targets[sequence.place[0]]))

        self._decode(sequences, forced, lambda _, given: given, take)
        return found

    def _decode(
        self,
        sequences: Sequence[SequenceState],
        stream: Callable[[SequenceState], Tensor],
        pick: Callable[[Tensor, Tensor], Tensor],
        take: Callable[[SequenceState, int, float], None],
    ) -> None:
        """Decode sequences to their ends, as many at once as the spec allows.

        Args:
            stream: what the picks of a sequence depend on beside the logits, a value for each of its tokens.
            pick: from log-probabilities [rows, vocabulary] and the rows' values of the stream to tokens [rows].
            take: told each sequence's next token and its log-probability; sets its `finish_reason` at the end.
        """
        if not sequences:
            return
        # The longest prompts first: memory that holds the first ones holds all.
        ordered = sorted(sequences, key=lambda sequence: (-len(sequence.request.prompt), sequence.place))
        waiting = deque(ordered)
        states = self._encode(ordered)
        batch = _Batch.of_size(min(self.spec.max_sequences, len(ordered)))
        decoder = _Decoder(self.network, len(batch.sequences), len(ordered[0].request.prompt))
        while True:
            free = [row for row, sequence in enumerate(batch.sequences) if sequence is None]
            if waiting and free:
                rows = free[: len(waiting)]
                for row in rows:
                    sequence = waiting.popleft()
                    batch.sequences[row], batch.streams[row] = sequence, stream(sequence)
                    batch.ages[row], batch.tokens[row] = 0, self.network.start
                decoder.place(rows, list(itertools.islice(states, len(rows))))
            elif len(free) == len(batch.sequences):
                return
            elif len(batch.sequences) - len(free) <= SHRINK * len(batch.sequences):
                kept = [row for row, sequence in enumerate(batch.sequences) if sequence is not None]
                batch.keep(kept)
                decoder.keep(kept)
            logprobs = decoder.step(batch.tokens, batch.ages).log_softmax(-1, dtype=torch.float32)
            values = torch.stack([numbers[age] for numbers, age in zip(batch.streams, batch.ages, strict=True)])
            tokens = pick(logprobs, values.to(self.device))
            picked = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1).tolist()
            batch.tokens = tokens.tolist()
            for row, current in enumerate(batch.sequences):
                if current is None:
                    continue
                batch.ages[row] += 1
                take(current, batch.tokens[row], picked[row])
                if current.finish_reason:
                    batch.free(row)

    def _encode(self, sequences: Sequence[SequenceState]) -> Iterator[Tensor]:
        """The encoder's last states [prompt, d_model] of each sequence in turn, made a few prompts ahead."""
        prompts = [
            (prompt, len(list(same)))
            for prompt, same in itertools.groupby(sequence.request.prompt for sequence in sequences)
        ]
        for first in range(0, len(prompts), ENCODED_TOGETHER):
            together = prompts[first : first + ENCODED_TOGETHER]
            ids, mask = self._pad([prompt for prompt, _ in together], left=False)
            encoded = self.network.encode(ids, mask)
            for row, (prompt, count) in enumerate(together):
                for _ in range(count):
                    yield encoded[row, : len(prompt)]

    def close(self) -> None:
        super().close()
        self.__dict__.pop("network", None)


@dataclass
class _Batch:
    """What each row of the decoder is at; a row without a sequence goes on computing, and nobody looks."""

    sequences: list[SequenceState | None]
    streams: list[Tensor]
    ages: list[int]
    tokens: list[int]

    @classmethod
    def of_size(cls, rows: int) -> _Batch:
        return cls([None] * rows, [torch.empty(0)] * rows, [0] * rows, [0] * rows)

    def free(self, row: int) -> None:
        self.sequences[row], self.ages[row] = None, 0

    def keep(self, rows: list[int]) -> None:
        self.sequences = [self.sequences[row] for row in rows]
        self.streams = [self.streams[row] for row in rows]
        self.ages = [self.ages[row] for row in rows]
        self.tokens = [self.tokens[row] for row in rows]


def _uniforms(sequence: SequenceState) -> Tensor:
    """The numbers in [0, 1) that decide a sequence's tokens: the same ones that single draws would give."""
    count = max(1, sequence.request.parameters.max_tokens)
    return torch.rand(count, generator=sequence.generator, dtype=torch.float64)


def _draw(temperature: float, top_k: int, top_p: float, logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [rows] from the tempered distribution over the likeliest, by the inverse of its cumulative sum.

    At temperature 0 they are the likeliest.

    Args:
        logprobs: [rows, vocabulary].
        uniforms: [rows], in [0, 1).
    """
    if temperature == 0:
        return logprobs.argmax(-1)
    width = logprobs.shape[-1]
    tokens = None
    if top_k or top_p < 1.0:
        logprobs, tokens = _likeliest(logprobs, min(top_k or width, width))
    probabilities = (logprobs.double() / temperature).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    if top_p < 1.0:
        probabilities = torch.where(cumulative - probabilities < top_p, probabilities, 0.0)
        cumulative = probabilities.cumsum(-1)
    threshold = uniforms.unsqueeze(1) * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, threshold, right=True).clamp_max(logprobs.shape[-1] - 1)
    return (places if tokens is None else tokens.gather(1, places)).squeeze(1)


def _likeliest(logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`topk` of [rows, vocabulary], for few of many, which it finds sooner.

    A token among the `count` likeliest lies in one of the `count` chunks of the vocabulary with the likeliest tokens.
    """
    rows, width = logprobs.shape
    if width % CHUNK or count * CHUNK * 4 > width:
        return logprobs.topk(count)
    chunks = logprobs.view(rows, -1, CHUNK)
    best = chunks.amax(-1).topk(count, sorted=False).indices.unsqueeze(-1)
    values, places = chunks.gather(1, best.expand(rows, count, CHUNK)).view(rows, -1).topk(count)
    tokens = best.squeeze(-1).gather(1, places // CHUNK) * CHUNK + places % CHUNK
    return values, tokens


@dataclass(frozen=True)
class _Layer:
    """The weights of an encoder's or decoder's layer; what is multiplied by the same input is stacked.

    Attributes:
        inputs: of queries, keys and values [3 * heads * d_kv, d_model].
        cross_query: of the decoder's queries of the encoder; empty in the encoder, as are the norm and output of these.
        widen: of the feed-forward's input [d_ff, d_model]; a gated one's gate is stacked on it [2 * d_ff, d_model].
    """

    norm: Tensor
    inputs: Tensor
    output: Tensor
    cross_norm: Tensor
    cross_query: Tensor
    cross_output: Tensor
    forward_norm: Tensor
    widen: Tensor
    narrow: Tensor


class _Network:
    """The computation of a T5 over the memory of transformers' module, whose parameters become views of the stacks."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.model = model
        self.heads: int = config.num_heads
        self.eps: float = config.layer_norm_epsilon
        self.gated: bool = config.is_gated_act
        self.start: int = config.decoder_start_token_id
        self.scale = output_scale(config)
        self.activation = _activation(config.dense_act_fn, model.encoder.block[0].layer[-1].DenseReluDense.act)
        self.encoder = [_layer(block) for block in model.encoder.block]
        self.decoder = [_layer(block) for block in model.decoder.block]
        cross = [block.layer[1].EncDecAttention for block in model.decoder.block]
        self.cross = _stack([part for attention in cross for part in (attention.k, attention.v)])
        """The keys' and values' weights of every decoder layer [layers * 2 * heads * d_kv, d_model]."""
        self.linear = _linear(self.cross)
        self.kernel = CpuAttention.build(config.d_kv, self.cross.dtype) if self.cross.device.type == "cpu" else None

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The encoder's states [prompts, length, d_model] of padded prompts."""
        prompts, length = ids.shape
        hidden = functional.embedding(ids, self.model.encoder.embed_tokens.weight)
        padding = torch.where(mask[:, None, None, :].bool(), 0.0, LEAST)
        bias = padding
        for block, layer in zip(self.model.encoder.block, self.encoder, strict=True):
            attention = block.layer[0].SelfAttention
            if attention.has_relative_attention_bias:
                bias = attention.compute_bias(length, length).float() + padding
            states = self.linear(self.norm(hidden, layer.norm), layer.inputs)
            query, key, value = states.view(prompts, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            weights = (query @ key.transpose(2, 3) + bias).softmax(-1).to(value.dtype)
            attended = (weights @ value).transpose(1, 2).reshape(prompts, length, -1)
            hidden = hidden + self.linear(attended, layer.output)
            hidden = hidden + self.feed_forward(hidden, layer)
        return self.norm(hidden, self.model.encoder.final_layer_norm.weight)

    def distances(self, count: int) -> list[Tensor]:
        """For each decoder layer, the bias [heads, count] of attention to the last `count` steps, the newest last."""
        found: list[Tensor] = []
        for block in self.model.decoder.block:
            attention = block.layer[0].SelfAttention
            if attention.has_relative_attention_bias:
                bias = attention.compute_bias(1, count, past_seen_tokens=count - 1)
                found.append(bias[0, :, 0].float().contiguous())
            else:
                found.append(found[-1])
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        hidden = self.norm(hidden, self.model.decoder.final_layer_norm.weight)
        return self.linear(hidden * self.scale, self.model.lm_head.weight)

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, self.eps)

    def feed_forward(self, hidden: Tensor, layer: _Layer) -> Tensor:
        wide = self.linear(self.norm(hidden, layer.forward_norm), layer.widen)
        if self.gated:
            gate, wide = wide.chunk(2, -1)
            return self.linear(self.activation(gate) * wide, layer.narrow)
        return self.linear(self.activation(wide), layer.narrow)


class _Decoder:
    """The decoder's memory for a fixed number of rows, each of which holds a sequence of any age.

    Attributes:
        time: steps made. The slot of a step in the ring is its time modulo the ring's length.
        ring: keys and values of self-attention, for each layer [2, rows, heads, ring, d_kv].
        cross: keys and values of the prompts, for each layer [2, rows, heads, width, d_kv].
        lengths: of the rows' prompts; `known` on the device, `padding` as what is added to scores.
        bias: of self-attention, for each layer [heads, ring], the newest step's last.
    """

    def __init__(self, network: _Network, rows: int, width: int) -> None:
        self.network = network
        weight = network.cross
        size = weight.shape[0] // (2 * len(network.decoder) * network.heads)
        self.ring = [weight.new_zeros(2, rows, network.heads, RING_STEP, size) for _ in network.decoder]
        self.cross = [weight.new_zeros(2, rows, network.heads, width, size) for _ in network.decoder]
        self.lengths = [0] * rows
        self.time = 0
        self._prompts_changed()
        self._ring_changed()

    def _prompts_changed(self) -> None:
        slots = torch.arange(self.cross[0].shape[3], device=self.network.cross.device)
        self.known = torch.tensor(self.lengths, device=slots.device)
        self.padding = torch.where(slots < self.known[:, None, None], 0.0, LEAST)

    def _ring_changed(self) -> None:
        self.slots = torch.arange(self.ring[0].shape[3], device=self.network.cross.device)
        self.bias = self.network.distances(len(self.slots))

    def place(self, rows: list[int], states: list[Tensor]) -> None:
        """Begin sequences in rows, from the encoder's states [prompt, d_model] of their prompts."""
        layers, heads = len(self.cross), self.network.heads
        padded = nn.utils.rnn.pad_sequence(states, batch_first=True)
        both = self.network.linear(padded, self.network.cross)
        both = both.view(len(rows), padded.shape[1], layers, 2, heads, -1).permute(2, 3, 0, 4, 1, 5)
        for row, one in zip(rows, states, strict=True):
            self.lengths[row] = len(one)
        widest = max(self.lengths)
        if widest <= SHRINK * self.cross[0].shape[3]:
            self.cross = [memory[:, :, :, :widest].contiguous() for memory in self.cross]
        index = torch.tensor(rows, device=padded.device)
        for memory, new in zip(self.cross, both, strict=True):
            memory[:, index, :, : padded.shape[1]] = new
        self._prompts_changed()

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        index = torch.tensor(rows, device=self.network.cross.device)
        for memories in (self.ring, self.cross):
            for layer, memory in enumerate(memories):
                memories[layer] = memory.index_select(1, index)
        self.lengths = [self.lengths[row] for row in rows]
        self._prompts_changed()

    def step(self, tokens: list[int], ages: list[int]) -> Tensor:
        """Logits [rows, vocabulary] after one more token a row.

        Args:
            ages: tokens that each row has had since it began.
        """
        network = self.network
        needed = -(-(max(ages) + 1) // RING_STEP) * RING_STEP
        if needed > len(self.slots) or needed <= len(self.slots) // 2:
            self._resize(needed)
        slot = self.time % len(self.slots)
        self.time += 1
        device = self.slots.device
        counts = torch.tensor(ages, device=device) + 1
        hidden = functional.embedding(torch.tensor(tokens, device=device), network.model.decoder.embed_tokens.weight)
        attend_self, attend_cross = self._attention(slot, counts)
        for number, layer in enumerate(network.decoder):
            states = network.linear(network.norm(hidden, layer.norm), layer.inputs)
            states = states.view(len(tokens), 3, network.heads, -1)
            self.ring[number][:, :, :, slot] = states[:, 1:].transpose(0, 1)
            hidden = hidden + network.linear(attend_self(number, states[:, 0]), layer.output)
            query = network.linear(network.norm(hidden, layer.cross_norm), layer.cross_query)
            query = query.view(len(tokens), network.heads, -1)
            hidden = hidden + network.linear(attend_cross(number, query), layer.cross_output)
            hidden = hidden + network.feed_forward(hidden, layer)
        return network.logits(hidden)

    def _attention(self, slot: int, counts: Tensor) -> tuple[Attention, Attention]:
        """Attention of one step to the row's own steps and to its prompt, from the layer and the queries.

        Args:
            slot: of the newest step.
            counts: steps of each row [rows].
        """
        kernel = self.network.kernel
        if kernel is not None:
            return (
                lambda layer, query: kernel(query, self.ring[layer], self.bias[layer], counts, slot),
                lambda layer, query: kernel(query, self.cross[layer], None, self.known, -1),
            )
        distance = (slot - self.slots) % len(self.slots)
        unknown = distance >= counts[:, None, None]
        biases: dict[int, Tensor] = {}  # layers share their tables, but for those of UMT5

        def attend_self(layer: int, query: Tensor) -> Tensor:
            table = self.bias[layer]
            if id(table) not in biases:
                biases[id(table)] = torch.where(unknown, LEAST, table[:, len(self.slots) - 1 - distance])
            return _attend(query, self.ring[layer], biases[id(table)])

        return attend_self, lambda layer, query: _attend(query, self.cross[layer], self.padding)

    def _resize(self, length: int) -> None:
        """Copy the newest steps into a ring of another length."""
        kept = min(length, len(self.slots), self.time)
        newest = torch.arange(self.time - kept, self.time, device=self.slots.device) % len(self.slots)
        for layer, memory in enumerate(self.ring):
            new = memory.new_zeros(*memory.shape[:3], length, memory.shape[4])
            new[:, :, :, :kept] = memory.index_select(3, newest)
            self.ring[layer] = new
        self.time = kept
        self._ring_changed()


def _attend(query: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
    """Attention of one query a row [rows, heads * d_kv], its weights in float32.

    Args:
        query: [rows, heads, d_kv].
        memory: keys and values [2, rows, heads, length, d_kv], contiguous.
        bias: float32, broadcasts to [rows, heads, length].
    """
    rows, heads, length = memory.shape[1:4]
    keys, values = memory.view(2, rows * heads, length, -1)
    scores = torch.bmm(query.reshape(rows * heads, 1, -1), keys.transpose(1, 2)).view(rows, heads, length)
    weights = (scores + bias).softmax(-1).to(values.dtype)
    return torch.bmm(weights.view(rows * heads, 1, length), values).view(rows, -1)


def _layer(block: Any) -> _Layer:
    attention, forward = block.layer[0], block.layer[-1]
    cross = block.layer[1] if block.is_decoder else None
    none = torch.empty(0)
    dense = forward.DenseReluDense
    own = attention.SelfAttention
    return _Layer(
        norm=attention.layer_norm.weight,
        inputs=_stack([own.q, own.k, own.v]),
        output=own.o.weight,
        cross_norm=cross.layer_norm.weight if cross else none,
        cross_query=cross.EncDecAttention.q.weight if cross else none,
        cross_output=cross.EncDecAttention.o.weight if cross else none,
        forward_norm=forward.layer_norm.weight,
        widen=_stack([dense.wi_0, dense.wi_1]) if hasattr(dense, "wi_0") else dense.wi.weight,
        narrow=dense.wo.weight,
    )


def _stack(parts: list[nn.Linear]) -> Tensor:
    """The weights of several layers in one matrix; theirs become views of it, so that a copy into them reaches it."""
    stacked = torch.cat([part.weight.detach() for part in parts])
    for part, view in zip(parts, stacked.split([part.out_features for part in parts]), strict=True):
        part.weight = nn.Parameter(view, requires_grad=False)
    return stacked


def _linear(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The product of an input with a weight like this one.

    In float32 on a CPU torch's own is MKL's, which on an AMD processor takes twice as long as oneDNN's.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return lambda states, matrix: torch.ops.mkldnn._linear_pointwise(states, matrix, None, "none", [], "")
    return functional.linear


def _activation(name: str, module: Any) -> Any:
    if name in ("gelu_new", "gelu_pytorch_tanh"):  # one kernel in place of eight
        return lambda values: functional.gelu(values, approximate="tanh")
    return module
