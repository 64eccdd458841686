"""Checkpoints: a folder of safetensors that is complete or absent, for any number of workers to resume from."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qcrd_ray.errors import UserError
from qcrd_ray.models.student import Student, save_student
from qcrd_ray.run_folder import RunFolder, atomic_folder
from qcrd_ray.training.engine import TrainEngine
from qcrd_ray.training.judge import OnlineJudge

SHARD_BYTES = 1 << 27


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `step` optimizer steps, and what it has counted so far."""

    step: int
    tokens: int = 0
    seconds: float = 0.0
    negatives_used: int = 0
    negatives_requested: int = 0
    negatives_empty: int = 0
    active: int = 0
    with_negative: int = 0
    stall_seconds: float = 0.0
    warmup_seconds: float = 0.0
    cut_prompts: int = 0
    cut_targets: int = 0
    judge_steps: int = 0
    judge_pretrained_steps: int = 0
    lag_min: int | None = None
    lag_max: int | None = None


def checkpoint_steps(run: RunFolder) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    if not run.checkpoints.is_dir():
        return []
    names = [path.name for path in run.checkpoints.iterdir() if (path / "progress.json").is_file()]
    return sorted(int(name) for name in names if re.fullmatch(r"\d{8}", name))


def checkpoint_folder(run: RunFolder, step: int) -> Path:
    return run.checkpoints / f"{step:08d}"


def save_checkpoint(
    run: RunFolder, engine: TrainEngine, student: Student, judge: OnlineJudge | None, progress: Progress, keep: int
) -> None:
    """Write a checkpoint and prune old ones. A collective; rank 0 writes."""
    first = dist.get_rank() == 0
    target = checkpoint_folder(run, progress.step)
    with atomic_folder(target) if first else nullcontext() as folder:
        weights = engine.weights()
        if folder is not None:
            save_student(student, folder / "student", network_state(weights or {}))
        del weights
        _save_state(engine, folder, "optimizer")
        if judge:
            _save_state(judge.engine, folder, "judge_optimizer")
        if folder is not None:
            if judge:
                judge.discriminator.save(folder / "judge")
            (folder / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
    if first:
        for step in checkpoint_steps(run)[:-keep]:
            shutil.rmtree(checkpoint_folder(run, step), ignore_errors=True)
    dist.barrier()


def read_progress(run: RunFolder) -> Progress | None:
    """The newest checkpoint's progress, None without one. Raises UserError for one that cannot be read."""
    steps = checkpoint_steps(run)
    if not steps:
        return None
    path = checkpoint_folder(run, steps[-1]) / "progress.json"
    try:
        return Progress(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"checkpoint {path}: cannot be read ({error}); remove that folder to go on from an older one"
        ) from None


def restore_optimizer(folder: Path, engine: TrainEngine, judge: OnlineJudge | None, progress: Progress) -> None:
    """Give the engines back their fp32 weights and moments. The modules were loaded from the same folder."""
    engine.load_full_state(_Tensors(folder, "optimizer"), progress.step)
    if judge:
        judge.engine.load_full_state(_Tensors(folder, "judge_optimizer"), progress.judge_steps)
        judge.steps = progress.judge_steps
        judge.pretrained_steps = progress.judge_pretrained_steps


def network_state(student_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The Hugging Face network's names: a Student holds it as `model`."""
    return {name.removeprefix("model."): value for name, value in student_state.items()}


def _save_state(engine: TrainEngine, folder: Path | None, name: str) -> None:
    """Write all parameters' full states, a file for every 128 MiB. A collective; rank 0 writes."""
    shard: dict[str, Tensor] = {}
    number = size = 0
    for parameter, tensors in engine.full_state():
        if folder is None:
            continue
        shard.update({f"{parameter}/{key}": value for key, value in tensors.items()})
        size += sum(value.numel() * value.element_size() for value in tensors.values())
        if size >= SHARD_BYTES:
            save_file(shard, folder / f"{name}-{number:05d}.safetensors")
            shard, number, size = {}, number + 1, 0
    if folder is not None and shard:
        save_file(shard, folder / f"{name}-{number:05d}.safetensors")


class _Tensors(dict[str, Any]):
    """The tensors of some safetensors files, read one by one."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__()
        self.files = [safe_open(path, framework="pt") for path in sorted(folder.glob(f"{name}-*.safetensors"))]
        self.place = {key: file for file in self.files for key in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self.place[name].get_tensor(name)
