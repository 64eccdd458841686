"""What is found wrong with a training run before anything is started or written."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import yaml

from qcrd_ray.config import ExperimentConfig, differing_keys
from qcrd_ray.errors import UserError
from qcrd_ray.models.discriminator import check_encoder
from qcrd_ray.models.lora import check_lora
from qcrd_ray.models.named import check_student
from qcrd_ray.rationales.sources import splits_available
from qcrd_ray.reporting.tracking import check_tracking
from qcrd_ray.run_folder import CONFIG, RESULT, RunFolder
from qcrd_ray.sampling.student_engine import engine_spec, is_seq2seq
from qcrd_ray.sampling.teacher import LIVE, check_teacher
from qcrd_ray.storage import shown
from qcrd_ray.training.engine import read_deepspeed_json
from qcrd_ray.training.initial_models import uses_judge
from qcrd_ray.training.judge_store import check_store


def check(config: ExperimentConfig, run: RunFolder) -> None:
    """Find what is wrong before anything is started or written. Raises UserError."""
    read_deepspeed_json(config.train, config.optim.clip)
    check_tracking(config, run)
    model = config.student.model
    if model.startswith("embedded:"):
        from qcrd_ray.models.embedded import embedded_student

        embedded_student(model.removeprefix("embedded:"))
    elif model.startswith("scratch:"):
        from qcrd_ray.models.scratch import SCRATCH_MODELS

        if model.removeprefix("scratch:") not in SCRATCH_MODELS:
            known = ", ".join(f"scratch:{name}" for name in SCRATCH_MODELS)
            raise UserError(f"config key student.model: {model} is unknown; expected one of {known}")
    else:
        check_student(model, config.student)
    check_lora(config.student)
    if uses_judge(config):
        check_encoder(config.judge.encoder)
        check_store(config)
    if config.negatives.checkpoint and config.negatives.source.startswith("fixed"):
        folder = Path(config.negatives.checkpoint)
        if not (folder / "config.json").is_file():
            raise UserError(f"config key negatives.checkpoint: {folder} is no student folder (no config.json in it)")
    if config.sampler.engine == "vllm" and is_seq2seq(config):
        raise UserError("config key sampler.engine: vllm runs no encoder-decoder student; set it to transformers")
    if engine_spec(config).engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("config key sampler.engine: vllm is not installed; run make setup, or set it to transformers")
    check_teacher(config)
    if run.root is None and config.teacher.engine in LIVE and config.uses_rationales and not config.teacher.store:
        raise UserError(
            f"config key teacher.store: with run.storage_path={shown(config.run.storage_path)} a live teacher needs a "
            "folder of its own that all nodes see"
        )
    if not {"valid", "test"} & set(splits_available(config)):
        raise UserError(
            f"config key data.path: {config.data.path} has no valid and no test split; accuracy is reported on one"
        )


def open_run(config: ExperimentConfig, run: RunFolder) -> dict[str, Any] | None:
    """Check the run's folder against the config. Returns the result of a run that is complete, else None."""
    if not run.exists() or not run.exists(CONFIG):
        if config.run.resume == "must":
            raise UserError(f"run.resume=must, but there is no run at {run}")
        return None
    if config.run.resume == "never":
        raise UserError(f"run {run} exists and run.resume=never; choose another run.name or remove the folder")
    differing = differing_keys(_identity_of(run), config.identity())
    if differing:
        raise UserError(f"run {run} has another config: {differing}; choose another run.name or remove the folder")
    finished: dict[str, Any] | None = run.read_json(RESULT)
    return finished


def _identity_of(run: RunFolder) -> dict[str, Any]:
    """What decides the learning in a run that is there."""
    try:
        return ExperimentConfig.model_validate(yaml.safe_load(run.read(CONFIG))).identity()
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(
            f"{run.where(CONFIG)} cannot be read ({' '.join(str(error).split())[:200]}); choose another run.name or "
            "remove the folder"
        ) from None
