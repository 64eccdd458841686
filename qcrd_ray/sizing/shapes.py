"""The modules that a config trains, without their weights."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from qcrd_ray.config import ExperimentConfig, JudgeConfig, StudentConfig
from qcrd_ray.errors import UserError
from qcrd_ray.models.named import hub_config
from qcrd_ray.models.scratch import VOCABULARY
from qcrd_ray.models.student import Student, as_student, empty_network

_T5 = {"model_type": "t5", "vocab_size": 32128, "d_kv": 64, "decoder_start_token_id": 0, "pad_token_id": 0}
_QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768, "num_key_value_heads": 2}
HUB_SHAPES: dict[str, dict[str, Any]] = {
    "google-t5/t5-small": {**_T5, "d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "google-t5/t5-base": {**_T5, "d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "google-t5/t5-large": {**_T5, "d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    "Qwen/Qwen2.5-0.5B": {
        **_QWEN, "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-7B": {
        **_QWEN, "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Shapes of the presets' models, so that they are sized where their config.json cannot be had."""


@dataclass(frozen=True)
class Parameters:
    """Elements of a module's weights, one entry a tensor; what is tied counts once."""

    trained: tuple[int, ...]
    frozen: tuple[int, ...]

    @classmethod
    def of(cls, module: torch.nn.Module) -> Parameters:
        every = list(module.parameters())
        trained = tuple(p.numel() for p in every if p.requires_grad)
        return cls(trained, tuple(p.numel() for p in every if not p.requires_grad))

    @property
    def count(self) -> int:
        return sum(self.trained) + sum(self.frozen)


def known_config(model: str, config: StudentConfig, vocabulary: int | None = None) -> Any:
    """The transformers config of `student.model`, with its dropout. Asks the network for nothing.

    Args:
        vocabulary: of a scratch student, whose tokenizer is learned from the data.

    Raises:
        UserError: the model's shape is not known here.
    """

    def read(name: str, settings: StudentConfig) -> Any:
        return _read("student.model", name, settings.trust_remote_code)

    return hub_config(model, config, vocabulary or VOCABULARY, read)


def _read(key: str, model: str, trust_remote_code: bool = False) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        if model not in HUB_SHAPES:
            known = ", ".join(HUB_SHAPES)
            raise UserError(
                f"config key {key}: no config.json of {model!r} on this machine; expected a folder that has one, a "
                f"model in the Hugging Face cache, or one of {known}"
            ) from None
    settings = dict(HUB_SHAPES[model])
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def outline(config: ExperimentConfig, shape: Any, dtype: torch.dtype) -> Student:
    """The student without data, adapters among it. Call it inside `without_data`."""
    tokenizer: Any = SimpleNamespace(pad=0, end=1)
    student = as_student(empty_network(shape, config.student, dtype), tokenizer, config.student)
    if config.student.lora.rank:
        _add_adapters(student, config.student, dtype)
    return student.train()


class _Adapted(torch.nn.Module):
    """A linear layer with a low-rank adapter beside it, computed as peft does. (peft itself moves the weights that it
    makes, which tensors without data do not allow.)"""

    def __init__(self, base: torch.nn.Linear, rank: int, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.dropout = torch.nn.Dropout(dropout) if dropout else torch.nn.Identity()
        self.a = torch.nn.Linear(base.in_features, rank, bias=False, dtype=dtype)
        self.b = torch.nn.Linear(rank, base.out_features, bias=False, dtype=dtype)
        self.weight = base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(x)
        return result + self.b(self.a(self.dropout(x))) * 1.0


def _add_adapters(student: Student, config: StudentConfig, dtype: torch.dtype) -> None:
    from qcrd_ray.models.lora import target_names

    network, lora = student.model, config.lora
    targets = target_names(network, config)
    network.requires_grad_(False)
    for name, module in list(network.named_modules()):
        if any(name == target or name.endswith(f".{target}") for target in targets):
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, _Adapted(module, lora.rank, lora.dropout, dtype))


def judge_outline(config: JudgeConfig) -> Any:
    """The discriminator's encoder, without data. Call it inside `without_data`."""
    from transformers import AutoModel, BertConfig, BertModel, T5EncoderModel

    from qcrd_ray.models.discriminator import SCRATCH, SCRATCH_VOCABULARY, T5_KIND, locate

    if config.encoder == SCRATCH:
        return BertModel(
            BertConfig(
                vocab_size=SCRATCH_VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=256, max_position_embeddings=config.max_tokens,
            ),
            add_pooling_layer=False,
        )  # fmt: skip
    shape = _read("judge.encoder", locate(config.encoder)[0])
    return T5EncoderModel(shape) if shape.model_type in T5_KIND else AutoModel.from_config(shape)
