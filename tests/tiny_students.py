"""Students of a few thousand weights without dropout, for tests that compare numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

VOCABULARY = 61
TOKENIZER: Any = SimpleNamespace(pad=0, end=1)


def tiny_student(family: str, vocabulary: int = VOCABULARY, seed: int = 0, **settings: Any) -> Any:
    """A T5, MT5, UMT5, BART, Llama (tied embeddings) or Qwen2. A width of 63 divides into no number of shards.

    Args:
        settings: of Qwen2.
    """
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from qcrd_ray.models.causal import CausalStudent
    from qcrd_ray.models.seq2seq import Seq2SeqStudent

    torch.manual_seed(seed)
    ids: dict[str, Any] = dict(vocab_size=vocabulary, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    if family in ("t5", "mt5", "umt5"):  # the last two with a gated feed-forward
        name = family.upper()
        shape = getattr(transformers, f"{name}Config")(
            **ids, d_model=32, d_kv=8, d_ff=63, num_layers=2, num_heads=4, dropout_rate=0.0
        )
        return Seq2SeqStudent(getattr(transformers, f"{name}ForConditionalGeneration")(shape), TOKENIZER)
    if family == "bart":
        bart = transformers.BartConfig(
            **ids, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=63, decoder_ffn_dim=63, dropout=0.0, max_position_embeddings=64, forced_eos_token_id=None,
            bos_token_id=2,
        )  # fmt: skip
        return Seq2SeqStudent(transformers.BartForConditionalGeneration(bart), TOKENIZER)
    shape: dict[str, Any] = dict(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=63, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=2, attn_implementation="sdpa",
    )  # fmt: skip
    if family == "llama":
        return CausalStudent(LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)), TOKENIZER)
    if "sliding_window" in settings:
        settings |= {"use_sliding_window": True, "max_window_layers": 0}
    return CausalStudent(Qwen2ForCausalLM(Qwen2Config(**shape, **settings)), TOKENIZER)
