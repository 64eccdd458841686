"""LoRA by peft: low-rank adapters on a student's linear layers, the only weights that are trained.

The adapters are injected into the Hugging Face network, which keeps its class and its attributes. What leaves training
is merged by name, W + B·A·alpha/rank, in a copy of the state, so that the module under training never changes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qcrd_ray.config import StudentConfig
from qcrd_ray.errors import UserError
from qcrd_ray.models.named import hub_config, hub_name
from qcrd_ray.models.student import Student, empty_network

ADAPTER = "adapter"
A, B = ".lora_A.default.weight", ".lora_B.default.weight"
SAMPLED_ELEMENTS = 1024


@dataclass(frozen=True)
class Lora:
    """What is known of a student's adapters.

    Attributes:
        scale: alpha / rank.
        settings: peft's adapter_config.json.
        base: fingerprint of the frozen weights.
    """

    scale: float
    settings: Mapping[str, Any]
    base: str


def check_lora(config: StudentConfig) -> None:
    """Find out whether the student can have the adapters, from its architecture alone.

    Raises:
        UserError: peft is not installed, or a target is no linear layer of the student.
    """
    if not config.lora.rank:
        return
    if importlib.util.find_spec("peft") is None:
        raise UserError('config key student.lora.rank: peft is not installed; pip install "qcrd_ray[lora]"')
    with torch.device("meta"):
        network = empty_network(hub_config(config.model, config), config)
    target_names(network, config)


def add_adapters(student: Student, config: StudentConfig) -> None:
    """Freeze the student's weights and put adapters on its linear layers.

    B is 0, so the student computes what it did before. A is drawn from torch's generator, which the caller has seeded.

    Raises:
        UserError: a target is no linear layer of the student.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    network, lora = student.model, config.lora
    base = _fingerprint(network)
    peft_config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target_names(network, config),
        base_model_name_or_path=hub_name(config.model),
        task_type="SEQ_2_SEQ_LM" if student.is_seq2seq else "CAUSAL_LM",
    )
    # Sets have an order of their own in each process; equal adapters are to be equal files.
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in peft_config.to_dict().items()}
    inject_adapter_in_model(peft_config, network)
    student.lora = Lora(lora.alpha / lora.rank, {**settings, "inference_mode": True}, base)


def target_names(network: Any, config: StudentConfig) -> list[str]:
    """Names, for peft, of the layers that get adapters: `student.lora.targets`, else all linear ones but the head.

    Raises:
        UserError: a target that is not there, is no `torch.nn.Linear`, or shares its weight with the embedding.
    """
    modules = dict(network.named_modules())
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear) and module is not head]
    short = sorted({_last(name) for name in linear})
    if config.lora.targets is None:
        if not linear:
            raise UserError(f"config key student.lora.rank: {config.model} has no torch.nn.Linear to put adapters on")
        exact = sum(_last(name) in short for name in modules) == len(linear)
        return short if exact else linear
    where = "config key student.lora.targets"
    known = f"the linear layers of {config.model} are {', '.join(short) or 'none'}"
    for target in config.lora.targets:
        matches = [modules[name] for name in modules if name == target or name.endswith(f".{target}")]
        if not matches:
            raise UserError(f"{where}: there is no layer {target!r}; {known}")
        for module in matches:
            if not isinstance(module, nn.Linear):
                raise UserError(f"{where}: {target!r} is no torch.nn.Linear but {type(module).__name__}; {known}")
            if module.weight is embedding.weight:
                raise UserError(f"{where}: {target!r} shares its weight with the embedding; {known}")
    return sorted(config.lora.targets)


def merge_adapters(state: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """The network's weights with the adapters in them, by Hugging Face's names.

    Args:
        state: of the network, whole and a copy: weights that have adapters are changed in place.
    """
    merged = {name.replace(".base_layer.", "."): value for name, value in state.items() if not name.endswith((A, B))}
    for name, a in state.items():
        if name.endswith(A):
            layer = name.removesuffix(A)
            weight = merged[f"{layer}.weight"]
            weight.copy_(torch.addmm(weight.float(), state[layer + B].float(), a.float(), alpha=lora.scale))
    return merged


def adapter_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters in a network's state, by the names of peft's files."""
    return {
        f"base_model.model.{name.replace('.default.', '.')}": value
        for name, value in state.items()
        if name.endswith((A, B))
    }


def save_adapter(lora: Lora, adapters: dict[str, Tensor], folder: Path) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` reads."""
    folder.mkdir(exist_ok=True)
    save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(lora.settings, indent=2, sort_keys=True), encoding="utf-8")


def restore_adapters(student: Student, base: str, weights: Mapping[str, Tensor]) -> None:
    """Give a student, built from its base, the adapters of a checkpoint.

    Args:
        base: fingerprint of the base that they were trained on.
        weights: fp32, under `name/weight` for each trained parameter.

    Raises:
        UserError: the base is another one.
    """
    assert student.lora is not None
    if student.lora.base != base:
        raise UserError(
            f"config key student.model: the weights at {student.model.name_or_path} are not those that the adapters of "
            "this run were trained on; put those back, or choose another run.name"
        )
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[f"{name}/weight"])


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _fingerprint(network: nn.Module) -> str:
    """Checksum over names, shapes and a share of the elements of all weights."""
    checksum = hashlib.blake2b(digest_size=16)
    for name, value in sorted(network.state_dict().items()):
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED_ELEMENTS)].float().cpu().contiguous()
        checksum.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        checksum.update(sample.numpy().tobytes())
    return checksum.hexdigest()
