"""From text to a student's token ids: prefixes, prompts and targets. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcrd_ray.config import StudentConfig

PREDICT = "<Predict>"
EXPLAIN = "<Explain>"
SEPARATOR = "\nThe answer is: "
"""Between the rationale and the label of a single sequence."""
SEPARATOR_TOKENS = 8
"""What it takes at most."""


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
        [ids] = self._encode_all([text])
        return ids

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return list(
            self.tokenizer(
                list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
            )["input_ids"]
        )

    def prompt(self, prefix: str, text: str) -> tuple[list[int], bool]:
        """Token ids of a prompt, and whether the text was cut to fit `max_input_tokens`."""
        [found] = self.prompts(prefix, [text])
        return found

    def prompts(self, prefix: str, texts: Sequence[str]) -> list[tuple[list[int], bool]]:
        """`prompt` of many texts.

        A prompt that is not cut has the ids of its text as a whole, line break included, so that whoever sends the text
        to a server or a pipeline asks what was trained: some tokenizers make one token of a full stop and a line break.
        """
        if not texts:
            return []
        adds_start = not self.is_seq2seq and self.tokenizer.bos_token_id is not None and _adds_start(self.tokenizer)
        start = [int(self.tokenizer.bos_token_id)] if adds_start else []
        asked = [f"{prefix} {text}" for text in texts]
        ending, tail = ("", [self.end]) if self.is_seq2seq else ("\n", self._suffix)
        whole = self._encode_all([text + ending for text in asked])
        longest = self.config.max_input_tokens
        found = []
        for text, ids in zip(asked, whole, strict=True):
            ids = [*start, *ids, self.end] if self.is_seq2seq else [*start, *ids]
            cut = len(ids) > longest
            if cut:
                ids = [*start, *self._encode(text)][: max(1, longest - len(tail))] + tail
            found.append((ids, cut))
        return found

    def target(self, text: str, limit: int) -> Target:
        """Token ids of a target of at most `limit` tokens, the end token among them."""
        [found] = self.targets([text], limit)
        return found

    def targets(self, texts: Sequence[str], limit: int) -> list[Target]:
        """`target` of many texts; of equal ones the same object."""
        distinct = list(dict.fromkeys(text.strip() for text in texts))
        if not distinct:
            return []
        found = {
            text: Target(ids[:limit], True) if len(ids) + 1 > limit else Target([*ids, self.end], False)
            for text, ids in zip(distinct, self._encode_all(distinct), strict=True)
        }
        return [found[text.strip()] for text in texts]

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _adds_start(tokenizer: Any) -> bool:
    probe = tokenizer("a")["input_ids"]
    return bool(probe) and probe[0] == tokenizer.bos_token_id


def load_run_tokenizer(folder: str, config: StudentConfig) -> StudentTokenizer:
    """The tokenizer of a run's `tokenizer/`; where that can be, without torch, which takes seconds to import."""
    settings = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") not in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return load_tokenizer(folder, config)
    from transformers import PreTrainedTokenizerFast

    # transformers has saved it, which leaves the key out where it is not so.
    network = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return StudentTokenizer(tokenizer, config, bool(network.get("is_encoder_decoder", False)))


def load_tokenizer(model: str, config: StudentConfig) -> StudentTokenizer:
    """The tokenizer of a student's folder or name."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=config.trust_remote_code)
    network = AutoConfig.from_pretrained(model, trust_remote_code=config.trust_remote_code)
    return StudentTokenizer(tokenizer, config, bool(network.is_encoder_decoder))
