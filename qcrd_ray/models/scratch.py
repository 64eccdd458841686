"""Small students from nothing: a few layers of random weights and a tokenizer learned from the task's own text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qcrd_ray.errors import UserError
from qcrd_ray.run_folder import atomic_folder

SCRATCH_MODELS = ("t5-tiny", "llama-tiny")
VOCABULARY = 4096
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def build_scratch(name: str, texts: Iterable[str], folder: Path, seed: int) -> Path:
    """`write_scratch` into a folder that appears complete or not at all."""
    with atomic_folder(folder) as temporary:
        write_scratch(name, texts, temporary, seed)
    return folder


def write_scratch(name: str, texts: Iterable[str], folder: Path, seed: int) -> None:
    """Write a Hugging Face folder of a small random model with a tokenizer learned from `texts`.

    The same name, texts and seed give the same files.

    Args:
        name: one of SCRATCH_MODELS.
        texts: what the tokenizer learns its merges from.
        folder: is there, empty.
        seed: of the weights.

    Raises:
        ValueError: an unknown name.
    """
    import torch

    if name not in SCRATCH_MODELS:
        raise ValueError(f"unknown scratch model {name!r}: expected one of {', '.join(SCRATCH_MODELS)}")
    tokenizer = train_tokenizer(texts)
    if name == "t5-tiny":
        _end_inputs(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = scratch_network(name, len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def scratch_config(name: str, vocabulary: int = VOCABULARY) -> Any:
    """The transformers config of a scratch model.

    Args:
        vocabulary: of its tokenizer; at most as large as the default.

    Raises:
        UserError: an unknown name.
    """
    if name not in SCRATCH_MODELS:
        known = ", ".join(f"scratch:{known}" for known in SCRATCH_MODELS)
        raise UserError(f"config key student.model: scratch:{name} is unknown; expected one of {known}")
    return _t5(vocabulary) if name == "t5-tiny" else _llama(vocabulary)


def scratch_network(name: str, vocabulary: int) -> Any:
    """The network of a scratch model, its weights drawn from torch's generator."""
    from transformers import LlamaForCausalLM, T5ForConditionalGeneration

    network = T5ForConditionalGeneration if name == "t5-tiny" else LlamaForCausalLM
    return network(scratch_config(name, vocabulary))


def train_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer learned from `texts`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    # Digits one by one: the sums of a number's digits are what such a student has to learn.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


def _end_inputs(tokenizer: Any) -> None:
    """Have the end token behind every text that is read as it is, as T5's own tokenizers do."""
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.eos_token_id)]
    )


def _t5(vocabulary: int) -> Any:
    from transformers import T5Config

    return T5Config(
        vocab_size=vocabulary,
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def _llama(vocabulary: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
