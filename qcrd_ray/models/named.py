"""What `student.model` names: a folder, a model of the Hugging Face Hub, one that is embedded, one from nothing.

Imports no torch: the driver and the processes that only pass a name on start sooner.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qcrd_ray.config import StudentConfig
from qcrd_ray.errors import UserError, first_line
from qcrd_ray.models.embedded import BASE_MODELS, embedded_student
from qcrd_ray.models.scratch import VOCABULARY, scratch_config
from qcrd_ray.run_folder import SCRATCH_STUDENT, RunFolder

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
DROPOUTS = (
    "dropout_rate", "attention_dropout", "dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop",
    "activation_dropout",
)  # fmt: skip
"""What the families of transformers call the probabilities that `student.dropout` sets."""


def local_model(run: RunFolder, model: str) -> str:
    """Where this process loads a `student.model` from; a scratch student was written into the run's folder."""
    if model.startswith("embedded:"):
        return str(embedded_student(model.removeprefix("embedded:")))
    if model.startswith("scratch:"):
        return str(run.get_folder(SCRATCH_STUDENT))
    return model


def hub_name(model: str) -> str | None:
    """What the Hugging Face Hub calls a `student.model`; None for a folder of this machine and a scratch student."""
    if model in BASE_MODELS:
        return BASE_MODELS[model]
    return model if HUB_NAME.fullmatch(model) and not Path(model).exists() else None


def check_student(model: str, config: StudentConfig) -> Any:
    """The transformers config of a student. Raises UserError if there is no such model."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        known = (
            "a Hugging Face name, a folder with config.json, embedded:smollm2-135m, scratch:t5-tiny, scratch:llama-tiny"
        )
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"config key student.model: no model at {model!r}; expected {known} ({reason})") from None


def load_network(auto: Any, model: str, **options: Any) -> Any:
    """`auto.from_pretrained(model, **options)` with all of its weights.

    Raises:
        UserError: they are damaged, or some are not there, which transformers would draw at random.
    """
    from safetensors import SafetensorError

    try:
        network, found = auto.from_pretrained(model, output_loading_info=True, **options)
    except SafetensorError as error:
        raise UserError(f"{model}: its weights cannot be read: {first_line(error)}") from None
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(
            f"{model}: its weights are not whole: {len(missing)} tensors are not in them ({', '.join(missing[:3])}); "
            "write the folder again, or give another"
        )
    return network


def hub_config(
    model: str,
    config: StudentConfig,
    vocabulary: int = VOCABULARY,
    read: Callable[[str, StudentConfig], Any] | None = None,
) -> Any:
    """The transformers config of any `student.model`, with `student.dropout` applied.

    Args:
        vocabulary: of a scratch student, whose tokenizer is learned from the data.
        read: finds the config of a folder or a Hugging Face name; default: `check_student`.

    Raises:
        UserError: there is no such model.
    """
    if model.startswith("scratch:"):
        found = scratch_config(model.removeprefix("scratch:"), vocabulary)
    else:
        if model.startswith("embedded:"):
            model = str(embedded_student(model.removeprefix("embedded:")))
        found = (read or check_student)(model, config)
    if config.dropout is not None:
        for name in DROPOUTS:
            if hasattr(found, name):
                setattr(found, name, config.dropout)
    return found
