"""From text to a student's token ids: prefixes, prompts and targets. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcrd_ray.config import StudentConfig

PREDICT = "<Predict>"
EXPLAIN = "<Explain>"
SEPARATOR = "\nThe answer is: "


@dataclass(frozen=True)
class Target:
    """A target's token ids, the end token included unless `cut`."""

    ids: list[int]
    cut: bool


class StudentTokenizer:
    """One tokenizer with the limits of the config.

    The prompt of a task is `<Predict> question` or `<Explain> question` (section 3.1); an encoder-decoder student
    reads it as its input, a decoder-only one up to a line break that ends it.
    """

    def __init__(self, tokenizer: Any, config: StudentConfig, is_seq2seq: bool) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.is_seq2seq = is_seq2seq
        self.end = int(tokenizer.eos_token_id)
        self.pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
        self._suffix = [] if is_seq2seq else self._encode("\n")

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, prefix: str, text: str) -> tuple[list[int], bool]:
        """Token ids of a prompt, and whether the text was cut to fit `max_input_tokens`."""
        ids = self._encode(f"{prefix} {text}")
        if not self.is_seq2seq and self.tokenizer.bos_token_id is not None and _adds_start(self.tokenizer):
            ids = [int(self.tokenizer.bos_token_id), *ids]
        tail = [self.end] if self.is_seq2seq else self._suffix
        room = max(1, self.config.max_input_tokens - len(tail))
        return ids[:room] + tail, len(ids) > room

    def target(self, text: str, limit: int) -> Target:
        """Token ids of a target of at most `limit` tokens, the end token among them."""
        ids = self._encode(text.strip())
        if len(ids) + 1 > limit:
            return Target(ids[:limit], True)
        return Target([*ids, self.end], False)

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _adds_start(tokenizer: Any) -> bool:
    probe = tokenizer("a")["input_ids"]
    return bool(probe) and probe[0] == tokenizer.bos_token_id


def load_tokenizer(model: str, config: StudentConfig) -> StudentTokenizer:
    """The tokenizer of a student's folder or name."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=config.trust_remote_code)
    network = AutoConfig.from_pretrained(model, trust_remote_code=config.trust_remote_code)
    return StudentTokenizer(tokenizer, config, bool(network.is_encoder_decoder))
