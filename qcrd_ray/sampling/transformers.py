"""The reference engine: transformers, both model families, one random stream a sequence.

`model.generate` draws a batch from one generator, so a text would depend on its neighbours in the batch. Here every
sequence has its own, and its raw log-probabilities are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcrd_ray.models.named import load_network
from qcrd_ray.sampling.engine import EngineSpec, Generation, Request
from qcrd_ray.seeding import stable_hash


@dataclass
class SequenceState:
    """One generation under way."""

    place: tuple[int, int]
    request: Request
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    count: int = 0
    finish_reason: str = ""

    @classmethod
    def of(cls, request: Request, place: tuple[int, int]) -> SequenceState:
        """A generation of a request, with the random stream that its seed and number decide.

        Args:
            place: index of the request and number of the generation.
        """
        seed = stable_hash(request.seed, "generation", place[1])
        return cls(place, request, torch.Generator().manual_seed(seed))


class TransformersEngine:
    """A model of either family on the CPU or a GPU."""

    def __init__(self, spec: EngineSpec) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        if spec.threads:
            torch.set_num_threads(spec.threads)
        config = AutoConfig.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
        self.is_seq2seq = bool(config.is_encoder_decoder)
        auto = AutoModelForSeq2SeqLM if self.is_seq2seq else AutoModelForCausalLM
        self.device = torch.device("cuda" if spec.gpu and torch.cuda.is_available() else "cpu")
        self.model: Any = load_network(
            auto,
            spec.model,
            dtype=torch.bfloat16 if spec.precision == "bf16" else torch.float32,
            trust_remote_code=spec.trust_remote_code,
            attn_implementation="sdpa",
        ).to(self.device)
        self.model.eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
        self.end = int(self.tokenizer.eos_token_id)
        self.pad = int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end)
        self.spec = spec
        self._encoded: dict[str, tuple[int, ...]] = {}

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[list[Generation]]:
        results: list[list[Generation | None]] = [[None] * request.n for request in requests]
        waiting = [
            SequenceState.of(request, (index, number))
            for index, request in enumerate(requests)
            for number in range(request.n)
        ]
        # Prompts of like length share a batch, so that little is padding.
        waiting.sort(key=lambda sequence: (-len(sequence.request.prompt), sequence.place))
        for start in range(0, len(waiting), self.spec.max_sequences):
            batch = waiting[start : start + self.spec.max_sequences]
            self._run(batch)
            for sequence in batch:
                index, number = sequence.place
                results[index][number] = self._finish(sequence)
        return results  # type: ignore[return-value]

    def _run(self, batch: list[SequenceState]) -> None:
        """Generate until every sequence of the batch has ended; those that have leave the batch."""
        step = self._start_seq2seq(batch) if self.is_seq2seq else self._start_causal(batch)
        alive = list(batch)
        logits = step.first()
        while True:
            tokens = self._sample(logits, alive)
            for sequence, token in zip(alive, tokens, strict=True):
                self._append(sequence, token)
            keep = [row for row, sequence in enumerate(alive) if not sequence.finish_reason]
            if not keep:
                return
            if len(keep) <= 0.75 * len(alive):
                step.select(keep)
                alive = [alive[row] for row in keep]
                tokens = [tokens[row] for row in keep]
            logits = step.next(tokens)

    def _sample(self, logits: Tensor, alive: list[SequenceState]) -> list[int]:
        """One token a sequence, and its raw log-probability added to the sequence."""
        logprobs = logits.float().log_softmax(-1)
        tokens = []
        greedy = logprobs.argmax(-1).tolist()
        for row, sequence in enumerate(alive):
            parameters = sequence.request.parameters
            values, token = logprobs[row], greedy[row]
            if not sequence.finish_reason and parameters.choices:
                allowed = self._allowed(sequence)
                values = torch.full_like(values, -math.inf).index_copy(0, allowed, values[allowed])
                token = int(values.argmax())
            if not sequence.finish_reason and parameters.temperature > 0:
                token = _draw(values, parameters.temperature, parameters.top_k, parameters.top_p, sequence.generator)
            tokens.append(token)
        picked = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device).unsqueeze(1)).squeeze(1).tolist()
        for sequence, value in zip(alive, picked, strict=True):
            if not sequence.finish_reason:
                sequence.logprob += value
                sequence.count += 1
        return tokens

    def _allowed(self, sequence: SequenceState) -> Tensor:
        """Tokens that go on with one of a sequence's choices; the end token after a whole one."""
        written = len(sequence.ids)
        choices = [self._encode_choice(choice) for choice in sequence.request.parameters.choices]
        fitting = [choice for choice in choices if list(choice[:written]) == sequence.ids]
        found = {choice[written] if len(choice) > written else self.end for choice in fitting}
        return torch.tensor(sorted(found), device=self.device)

    def _encode_choice(self, choice: str) -> tuple[int, ...]:
        """A choice's tokens as they stand after other text: some tokenizers put a space before a text's first word."""
        if choice not in self._encoded:
            before, whole = (
                self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (":", f":{choice}")
            )
            self._encoded[choice] = tuple(whole[len(before) :])
        return self._encoded[choice]

    def _append(self, sequence: SequenceState, token: int) -> None:
        if sequence.finish_reason:
            return
        if token == self.end and not sequence.request.parameters.ignore_end:
            sequence.finish_reason = "stop"
            return
        sequence.ids.append(token)
        parameters = sequence.request.parameters
        if parameters.stop:
            text = self.tokenizer.decode(sequence.ids, skip_special_tokens=True)
            if any(stop in text for stop in parameters.stop):
                sequence.finish_reason = "stop"
                return
        if sequence.count >= parameters.max_tokens:
            sequence.finish_reason = "length"

    def _finish(self, sequence: SequenceState) -> Generation:
        text = self.tokenizer.decode(sequence.ids, skip_special_tokens=True)
        for stop in sequence.request.parameters.stop:
            text = text.split(stop)[0]
        mean = sequence.logprob / sequence.count if sequence.count else math.nan
        return Generation(text, tuple(sequence.ids), mean, sequence.finish_reason)

    def _start_seq2seq(self, batch: list[SequenceState]) -> _Seq2SeqStep:
        return _Seq2SeqStep(self.model, *self._pad([s.request.prompt for s in batch], left=False))

    def _start_causal(self, batch: list[SequenceState]) -> _CausalStep:
        return _CausalStep(self.model, *self._pad([s.request.prompt for s in batch], left=True))

    def _pad(self, prompts: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        length = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), length), self.pad)
        mask = torch.zeros((len(prompts), length), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            place = slice(length - len(prompt), length) if left else slice(0, len(prompt))
            ids[row, place] = torch.tensor(list(prompt))
            mask[row, place] = 1
        return ids.to(self.device), mask.to(self.device)

    @torch.inference_mode()
    def target_logprobs(self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> list[list[float]]:
        found: list[list[float]] = []
        pairs = list(zip(prompts, targets, strict=True))
        for first in range(0, len(pairs), self.spec.max_sequences):
            batch = pairs[first : first + self.spec.max_sequences]
            ids, mask = self._pad([prompt for prompt, _ in batch], left=not self.is_seq2seq)
            step = _Seq2SeqStep(self.model, ids, mask) if self.is_seq2seq else _CausalStep(self.model, ids, mask)
            length = max(len(target) for _, target in batch)
            values: list[list[float]] = [[] for _ in batch]
            tokens: list[int] = []
            for place in range(length):
                logits = step.next(tokens) if place else step.first()
                tokens = [target[place] if place < len(target) else self.pad for _, target in batch]
                logprobs = logits.float().log_softmax(-1)
                picked = logprobs.gather(1, torch.tensor(tokens, device=self.device).unsqueeze(1)).squeeze(1).tolist()
                for row, (_, target) in enumerate(batch):
                    if place < len(target):
                        values[row].append(picked[row])
            found.extend(values)
        return found

    def load_weights(self, snapshot: Path) -> None:
        from safetensors.torch import load_file

        state: dict[str, Tensor] = {}
        for file in sorted(snapshot.glob("*.safetensors")):
            state.update(load_file(file))
        own = self.model.state_dict()
        missing = [name for name in own if name not in state and not _is_tied(name, own, state)]
        unknown = [name for name in state if name not in own]
        if missing or unknown or not state:
            raise RuntimeError(
                f"snapshot {snapshot}: missing {missing[:3]}, unknown {unknown[:3]}, {len(state)} tensors"
            )
        holder: dict[int, str] = {}
        for name, value in state.items():
            other = holder.setdefault(own[name].data_ptr(), name)
            if other != name and not torch.equal(value, state[other]):
                raise RuntimeError(f"snapshot {snapshot}: {name} and {other} differ, but the model has tied them")
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)

    def rest(self) -> None:
        """Keeps its memory."""

    def close(self) -> None:
        self.model = None


def _is_tied(name: str, own: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    """Whether a parameter that the file lacks shares its memory with one that it has."""
    return any(other in state and own[other].data_ptr() == own[name].data_ptr() for other in own if other != name)


class _CausalStep:
    """Left-padded prompts, then a token a row and step."""

    def __init__(self, model: Any, ids: Tensor, mask: Tensor) -> None:
        from transformers import DynamicCache

        self.model, self.ids, self.mask = model, ids, mask
        self.cache = DynamicCache()
        self.position = (mask.cumsum(-1) - 1).clamp_min(0)

    def first(self) -> Tensor:
        logits = self._forward(self.ids, self.position)
        self.position = self.position[:, -1:]
        return logits

    def next(self, tokens: list[int]) -> Tensor:
        ids = torch.tensor(tokens, device=self.ids.device).unsqueeze(1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        self.position = self.position + 1
        return self._forward(ids, self.position)

    def _forward(self, ids: Tensor, position: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def select(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self.ids.device)
        self.cache.batch_select_indices(index)
        self.mask, self.position = self.mask[index], self.position[index]


class _Seq2SeqStep:
    """Prompts through the encoder once, then a decoder token a row and step."""

    def __init__(self, model: Any, ids: Tensor, mask: Tensor) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        self.model, self.mask = model, mask
        self.states = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def first(self) -> Tensor:
        return self.next([self.model.config.decoder_start_token_id] * len(self.mask))

    def next(self, tokens: list[int]) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.states),
            attention_mask=self.mask,
            decoder_input_ids=torch.tensor(tokens, device=self.mask.device).unsqueeze(1),
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]

    def select(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.states, self.mask = self.states[index], self.mask[index]


def _draw(logprobs: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """A token from the tempered distribution over the likeliest, by the inverse of its cumulative sum."""
    width = logprobs.shape[-1]
    if top_k == 0 and top_p == 1.0:  # nothing is cut off, so nothing has to be sorted
        values, tokens = logprobs, torch.arange(width)
    else:
        values, tokens = logprobs.topk(min(top_k or width, width))
    probabilities = (values.double() / temperature).softmax(-1)
    if top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = torch.where(before < top_p, probabilities, 0.0)
    cumulative = probabilities.cumsum(-1)
    uniform = torch.rand((), generator=generator, dtype=torch.float64).to(cumulative.device)
    place = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    return int(tokens[min(place, len(tokens) - 1)])
