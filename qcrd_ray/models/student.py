"""The student's interface: prompts with targets in, a cross-entropy for every target out.

A pass is a set of prompts, each with any number of targets. The prompt is encoded once for all of them: a seq2seq
student shares the encoder's states (seq2seq.py), a causal one packs the targets behind the prompt under a block mask
(causal.py). Training, the choice pass and the equivalence tests all go through `Student.forward`, one call a pass, so
that an engine which wraps the module sees every use of its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcrd_ray.config import StudentConfig
from qcrd_ray.models.cross_entropy import Head, token_cross_entropy
from qcrd_ray.models.named import DROPOUTS, hub_config, load_network
from qcrd_ray.objectives.mutual_information import peak_of, wide
from qcrd_ray.tasks.prompts import StudentTokenizer, load_tokenizer

if TYPE_CHECKING:
    from qcrd_ray.models.lora import Lora


@dataclass(frozen=True)
class Item:
    """One prompt and its targets, all token ids. `key` leads back to whoever asked."""

    prompt: Sequence[int]
    targets: Sequence[Sequence[int]]
    key: Any = None

    @property
    def size(self) -> int:
        """Tokens of the prompt and of the targets."""
        return len(self.prompt) + sum(len(target) for target in self.targets)


class Student(nn.Module):
    """A language model whose `forward` gives the mean cross-entropy of every target under its prompt.

    Attributes:
        lora: of the adapters, where only those are trained.
    """

    model: Any
    tokenizer: StudentTokenizer
    is_seq2seq: bool
    lora: Lora | None = None

    def forward(self, items: Sequence[Item], peaks_of: Sequence[int] | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Cross-entropies of one pass.

        Args:
            items: P prompts with R_p targets each; a target has at least one token.
            peaks_of: places among the N targets whose peaks are wanted too.

        Returns:
            [N] float32, N = Σ R_p, in the order of the items and their targets: the mean over a target's tokens of
            -log p(token | prompt, tokens before it), in nats. With `peaks_of`, behind them [len(peaks_of), V] float32:
            the highest probability that any position of the target gives each word of the vocabulary.
        """
        raise NotImplementedError

    def padded_tokens(self, items: Sequence[Item]) -> int:
        """Tokens that one forward over `items` computes, padding included."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def has_dropout(self) -> bool:
        """Whether training mode and evaluation mode can give different values."""
        shape = self.model.config  # some families drop by a function, for which there is no module
        return any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.modules()) or any(
            isinstance(rate := getattr(shape, name, None), float) and rate > 0.0 for name in DROPOUTS
        )

    def label_ce(self, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> Tensor:
        """Cross-entropy of a label under each prompt: [B] float32, nats."""
        return self([Item(prompt, [label]) for prompt, label in zip(prompts, labels, strict=True)])

    def rationale_ce(self, prompts: Sequence[Sequence[int]], rationales: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """Cross-entropy of each rationale under its prompt: [B, R] float32, nats, NaN where a prompt has fewer."""
        flat = self([Item(prompt, targets) for prompt, targets in zip(prompts, rationales, strict=True)])
        counts = [len(targets) for targets in rationales]
        grid = flat.new_full((len(counts), max(counts, default=0)), float("nan"))
        rows = [row for row, count in enumerate(counts) for _ in range(count)]
        columns = [column for count in counts for column in range(count)]
        return grid.index_put((torch.tensor(rows), torch.tensor(columns)), flat) if rows else grid


def cut_into_passes(student: Student, items: Sequence[Item], tokens_per_pass: int, *, split: bool) -> list[list[Item]]:
    """Group items into passes of at most `tokens_per_pass` padded tokens, longest first.

    With `split`, an item above the budget is cut into several with the same prompt, its `key` a list with an entry a
    target. What cannot be cut has a pass to itself. The grouping is a function of the items alone.
    """
    pieces: list[Item] = []
    for item in items:
        pieces.extend(_split(student, item, tokens_per_pass) if split else [item])
    pieces.sort(key=lambda item: -item.size)
    passes: list[list[Item]] = []
    for item in pieces:
        if passes and student.padded_tokens([*passes[-1], item]) <= tokens_per_pass:
            passes[-1].append(item)
        else:
            passes.append([item])
    return passes


def _split(student: Student, item: Item, budget: int) -> list[Item]:
    if len(item.targets) <= 1 or student.padded_tokens([item]) <= budget:
        return [item]
    half = len(item.targets) // 2
    first = Item(item.prompt, item.targets[:half], item.key[:half])
    second = Item(item.prompt, item.targets[half:], item.key[half:])
    return _split(student, first, budget) + _split(student, second, budget)


def losses_of_targets(
    head: Head, hidden: Tensor, tokens: Tensor, lengths: Sequence[int], peaks_of: Sequence[int] | None
) -> Tensor | tuple[Tensor, Tensor]:
    """What `Student.forward` returns.

    Args:
        hidden: [T, d], the states that predict the targets' tokens, target after target.
        tokens: [T].
        lengths: of the N targets; they add up to T.
    """
    count = len(lengths)
    owner = torch.tensor([place for place, length in enumerate(lengths) for _ in range(length)], device=hidden.device)
    if peaks_of is None:
        return mean_by_owner(token_cross_entropy(head, hidden, tokens), owner, count)
    logits = wide(head(hidden))
    ce = mean_by_owner(F.cross_entropy(logits, tokens, reduction="none"), owner, count)
    of_target = logits.split(list(lengths))
    peaks = [peak_of(of_target[place]) for place in peaks_of]
    return ce, torch.stack(peaks) if peaks else logits.new_zeros(0, logits.shape[-1])


def mean_by_owner(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Mean of `values` [T] over the tokens of each owner 0..count-1 -> [count]."""
    sums = values.new_zeros(count).index_add(0, owner, values)
    numbers = values.new_zeros(count).index_add(0, owner, torch.ones_like(values))
    return sums / numbers


def load_student(model: str, config: StudentConfig, dtype: torch.dtype = torch.float32) -> Student:
    """Load a student of either family from a Hugging Face folder or name.

    Raises:
        UserError: there is no such model, it is neither encoder-decoder nor decoder-only, or its weights are not whole.
    """
    shape = hub_config(model, config)
    network = load_network(
        _auto_class(shape), model, config=shape, dtype=dtype, trust_remote_code=config.trust_remote_code,
        attn_implementation="sdpa",
    )  # fmt: skip
    return as_student(network, load_tokenizer(model, config), config)


def as_student(network: Any, tokenizer: StudentTokenizer, config: StudentConfig) -> Student:
    """A network of transformers as a student of its family."""
    from qcrd_ray.models.causal import CausalStudent
    from qcrd_ray.models.seq2seq import Seq2SeqStudent

    if config.gradient_checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return (Seq2SeqStudent if network.config.is_encoder_decoder else CausalStudent)(network, tokenizer)


def empty_network(shape: Any, config: StudentConfig, dtype: torch.dtype = torch.float32) -> Any:
    """The network of a transformers config, no weights loaded; under `torch.device("meta")` it has none at all."""
    return _auto_class(shape).from_config(
        shape, dtype=dtype, trust_remote_code=config.trust_remote_code, attn_implementation="sdpa"
    )


def _auto_class(shape: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if shape.is_encoder_decoder else AutoModelForCausalLM


def save_student(student: Student, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write a student as a Hugging Face folder (safetensors, config, generation config, tokenizer).

    Args:
        state: the network's weights, where they were gathered from shards; default: the module's own.
    """
    student.model.save_pretrained(folder, state_dict=state, safe_serialization=True)
    student.tokenizer.tokenizer.save_pretrained(folder)
