"""Small students from nothing: a few layers of random weights and a tokenizer learned from the task's own text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qcrd_ray.run_folder import atomic_folder

SCRATCH_MODELS = ("t5-tiny", "llama-tiny")
VOCABULARY = 4096
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def build_scratch(name: str, texts: Iterable[str], folder: Path, seed: int) -> Path:
    """Write a Hugging Face folder of a small random model with a tokenizer learned from `texts`.

    The same name, texts and seed give the same files.

    Args:
        name: one of SCRATCH_MODELS.
        texts: what the tokenizer learns its merges from.
        folder: appears complete or not at all.
        seed: of the weights.

    Raises:
        ValueError: an unknown name.
    """
    import torch

    if name not in SCRATCH_MODELS:
        raise ValueError(f"unknown scratch model {name!r}: expected one of {', '.join(SCRATCH_MODELS)}")
    tokenizer = _train_tokenizer(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _t5(len(tokenizer)) if name == "t5-tiny" else _llama(len(tokenizer))
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def _train_tokenizer(texts: Iterable[str]) -> Any:
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


def _t5(vocabulary: int) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
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
        )  # fmt: skip
    )


def _llama(vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
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
        )  # fmt: skip
    )
