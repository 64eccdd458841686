"""Checkpoints: a folder of safetensors that is complete or absent, for any number of workers to resume from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qcrd_ray.config import StudentConfig
from qcrd_ray.errors import UserError
from qcrd_ray.models.lora import add_adapters, restore_adapters
from qcrd_ray.models.student import Student, load_student, save_student
from qcrd_ray.run_folder import CHECKPOINTS, DamagedFolder, RunFolder
from qcrd_ray.training.engine import TrainEngine
from qcrd_ray.training.judge import OnlineJudge
from qcrd_ray.training.kept_choices import KeptChoices

SHARD_BYTES = 1 << 27
BASE = "base.txt"


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
    snapshots: int = 0
    publish_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    cut_prompts: int = 0
    cut_targets: int = 0
    judge_steps: int = 0
    judge_pretrained_steps: int = 0
    judge_reused: bool = False
    lag_min: int | None = None
    lag_max: int | None = None


def checkpoint_steps(run: RunFolder) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    names = [name for name in run.list(CHECKPOINTS) if re.fullmatch(r"\d{8}", name)]
    return sorted(int(name) for name in names if run.has_folder(f"{CHECKPOINTS}/{name}"))


def checkpoint_name(step: int) -> str:
    return f"{CHECKPOINTS}/{step:08d}"


def save_checkpoint(
    run: RunFolder,
    engine: TrainEngine,
    student: Student,
    judge: OnlineJudge | None,
    progress: Progress,
    keep: int,
    fence: Callable[[], None],
    choices: KeptChoices | None = None,
) -> list[int]:
    """Write a checkpoint and prune old ones. A collective; rank 0 writes.

    Args:
        fence: raises where this process may write no more; it then leaves no checkpoint.

    Returns:
        The steps of the checkpoints that are there, oldest first, on rank 0; none elsewhere.

    Raises:
        UserError: the storage cannot take it; the checkpoints that are there stay as they are.
    """
    first = dist.get_rank() == 0
    name = checkpoint_name(progress.step)
    with run.new_folder(name) if first else nullcontext() as folder:
        write = StateWriter(run, name, folder)
        if student.lora is None:
            weights = network_state(engine.weights() or {})
            write(lambda place: save_student(student, place / "student", weights))
        else:  # the frozen weights stay where they came from; the adapters are among the optimizer's
            base = student.lora.base
            write(lambda place: (place / BASE).write_text(base, encoding="utf-8"))
        save_state(engine, write, "optimizer")
        if judge:
            save_state(judge.engine, write, "judge_optimizer")
            write(lambda place: judge.discriminator.save(place / "judge"))
        if choices:
            write(choices.save)
        text = json.dumps(asdict(progress))
        write(lambda place: (place / "progress.json").write_text(text, encoding="utf-8"))
        if first:
            fence()
    steps = checkpoint_steps(run) if first else []
    for step in steps[:-keep]:
        run.remove(checkpoint_name(step))
    dist.barrier()
    return steps[-keep:]


@dataclass(frozen=True)
class StateWriter:
    """Writes into a folder in the making, again where the storage fails for a moment; nothing without a folder."""

    run: RunFolder
    name: str
    folder: Path | None

    def __call__(self, action: Callable[[Path], object]) -> None:
        folder = self.folder
        if folder is not None:
            self.run.patiently(self.name, lambda: action(folder))


def newest_progress(run: RunFolder, check: bool = False) -> Progress | None:
    """The newest checkpoint's progress, None without one.

    Args:
        check: hold all of the checkpoint's files against its manifest.

    Raises:
        UserError: a checkpoint that is damaged.
    """
    steps = checkpoint_steps(run) if run.exists() else []
    if not steps:
        return None
    path = open_checkpoint(run, steps[-1], check) / "progress.json"
    try:
        return Progress(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"checkpoint {path}: cannot be read ({error}); remove that folder to go on from an older one"
        ) from None


def open_checkpoint(run: RunFolder, step: int, check: bool) -> Path:
    """A checkpoint's folder, as files of this machine. Raises UserError for one that is damaged."""
    try:
        return run.get_folder(checkpoint_name(step), check)
    except DamagedFolder as error:
        older = [other for other in checkpoint_steps(run) if other < step]
        there = f"from step {older[-1]}" if older else "from the start (there is no older one)"
        raise DamagedFolder(f"checkpoint {error}; remove that folder to go on {there}") from None


def build_student(model: str, config: StudentConfig, dtype: torch.dtype, resumed: Path | None) -> Student:
    """The student as training starts with it, or goes on with it.

    Args:
        model: folder or name of the untouched student.
        resumed: the checkpoint to go on from.
    """
    if not config.lora.rank:
        return load_student(str(resumed / "student") if resumed else model, config, dtype)
    student = load_student(model, config, dtype)
    add_adapters(student, config)
    if resumed:
        restore_adapters(student, (resumed / BASE).read_text(encoding="utf-8"), _Tensors(resumed, "optimizer"))
    return student


def restore_optimizer(folder: Path, engine: TrainEngine, judge: OnlineJudge | None, progress: Progress) -> None:
    """Give the engines back their fp32 weights and moments. The modules were built from the same folder."""
    load_state(engine, folder, "optimizer", progress.step)
    if judge:
        load_state(judge.engine, folder, "judge_optimizer", progress.judge_steps)
        judge.steps = progress.judge_steps
        judge.pretrained_steps = progress.judge_pretrained_steps
        judge.reused = progress.judge_reused


def load_state(engine: TrainEngine, folder: Path, name: str, step: int) -> None:
    """Give an engine what `save_state` has written, after `step` updates."""
    engine.load_full_state(_Tensors(folder, name), step)


def network_state(student_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The Hugging Face network's names: a Student holds it as `model`."""
    return {name.removeprefix("model."): value for name, value in student_state.items()}


def save_state(engine: TrainEngine, write: StateWriter, name: str) -> None:
    """Write all parameters' full states, a file for every 128 MiB. A collective; rank 0 writes."""
    shard: dict[str, Tensor] = {}
    number = size = 0

    def save() -> None:
        write(lambda folder: save_file(shard, folder / f"{name}-{number:05d}.safetensors"))

    for parameter, tensors in engine.full_state():
        if write.folder is None:
            continue
        shard.update({f"{parameter}/{key}": value for key, value in tensors.items()})
        size += sum(value.numel() * value.element_size() for value in tensors.values())
        if size >= SHARD_BYTES:
            save()
            shard, number, size = {}, number + 1, 0
    if shard:
        save()


class _Tensors(dict[str, Any]):
    """The tensors of some safetensors files, read one by one."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__()
        self.files = [safe_open(path, framework="pt") for path in sorted(folder.glob(f"{name}-*.safetensors"))]
        self.place = {key: file for file in self.files for key in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self.place[name].get_tensor(name)
