"""What a student's folder says of itself, so that it is used without the config of its run. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field

from qcrd_ray.config import (
    EvaluationConfig,
    ExperimentConfig,
    MethodName,
    Positive,
    SamplerConfig,
    Section,
    StudentConfig,
    TaskConfig,
    TaskName,
)
from qcrd_ray.errors import UserError, first_line

STUDENT_FILE = "qcrd_ray.json"
MOST_BYTES = 1 << 20


class ExportedStudent(Section):
    """`student/qcrd_ray.json`: what a student's prompts and the lengths of what it writes depend on.

    It holds no leave to run code: a folder from elsewhere may say anything.
    """

    format: Literal[1] = Field(1, description="of this file")
    task: TaskName
    custom: TaskConfig | None = Field(description="settings of a custom task, null for the others")
    method: MethodName
    max_input_tokens: Positive
    max_rationale_tokens: Positive
    max_label_tokens: Positive = Field(description="of a predicted label (evaluation.max_new_tokens)")
    precision: Literal["bf16", "fp32"] = Field(description="in which it was evaluated")

    @classmethod
    def of(cls, config: ExperimentConfig) -> ExportedStudent:
        return cls(
            task=config.task,
            custom=config.custom if config.task == "custom" else None,
            method=config.method,
            max_input_tokens=config.student.max_input_tokens,
            max_rationale_tokens=config.student.max_rationale_tokens,
            max_label_tokens=config.evaluation.max_new_tokens,
            precision=config.sampler.precision,
        )

    def config(self, model: str, trust_remote_code: bool = False) -> ExperimentConfig:
        """A config under which `model` reads and writes what it did when it was evaluated."""
        return ExperimentConfig(
            task=self.task,
            method=self.method,
            custom=self.custom or TaskConfig(),
            student=StudentConfig(
                model=model,
                trust_remote_code=trust_remote_code,
                max_input_tokens=self.max_input_tokens,
                max_rationale_tokens=self.max_rationale_tokens,
            ),
            evaluation=EvaluationConfig(max_new_tokens=self.max_label_tokens),
            sampler=SamplerConfig(precision=self.precision),
        )

    def text(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"


def as_trained(config: ExperimentConfig, model: str) -> ExperimentConfig:
    """A config that asks a student as it was trained: by the method and lengths of its folder, where that has them.

    Raises:
        UserError: the folder's `qcrd_ray.json` is not what it should be.
    """
    folder = Path(model)
    if not (folder / STUDENT_FILE).is_file():
        return config
    own = read_exported(folder)
    lengths = {"max_input_tokens": own.max_input_tokens, "max_rationale_tokens": own.max_rationale_tokens}
    evaluation = config.evaluation.model_copy(update={"max_new_tokens": own.max_label_tokens})
    student = config.student.model_copy(update=lengths)
    return config.model_copy(update={"method": own.method, "student": student, "evaluation": evaluation})


def check_exported(folder: Path, config: StudentConfig) -> None:
    """Raises UserError where a folder's weights are not there or not whole, or its tokenizer cannot be read.

    An engine would say less of what is wrong. The weights are not read, but for how long they are.
    """
    from qcrd_ray.tasks.prompts import load_tokenizer

    _check_weights(folder)
    try:
        load_tokenizer(str(folder), config)
    except Exception as error:  # each kind of tokenizer has exceptions of its own
        raise UserError(f"{folder}: its tokenizer cannot be read: {first_line(error)}") from None


def _check_weights(folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    files = {path.name for path in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: no index of weights") from None
        if wanted - files:
            raise UserError(f"{folder}: its weights are not whole: no {sorted(wanted - files)[0]} in it")
    if not files and not list(folder.glob("*.bin")):
        raise UserError(f"{folder}: no weights in it; expected model.safetensors")
    for name in sorted(files):
        try:
            with safe_open(folder / name, "numpy"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / name}: cannot be read as safetensors: {first_line(error)}") from None


def read_exported(folder: Path, config: ExperimentConfig | None = None) -> ExportedStudent:
    """Read a student folder's `qcrd_ray.json`.

    Args:
        config: of its run, for a folder that has no such file.

    Raises:
        UserError: no such folder or file, or not what it should be.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a student folder, as training leaves in runs/NAME/student")
    if not (folder / "config.json").is_file():
        inner = folder / "student"
        hint = f"did you mean {inner}?" if (inner / "config.json").is_file() else "runs/NAME/student is one"
        raise UserError(f"{folder}: no student folder (no config.json in it); {hint}")
    if config is not None:
        return ExportedStudent.of(config)
    file = folder / STUDENT_FILE
    try:
        with file.open("rb") as stream:
            raw: Any = json.loads(stream.read(MOST_BYTES))
    except FileNotFoundError:
        raise UserError(
            f"{file}: not found; training writes it at its end. For a folder without one give its run's config: "
            "--config runs/NAME/config.yaml"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: no valid JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        return ExportedStudent.model_validate(raw)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the whole"
        found = "" if first["type"] == "missing" else f", found {str(first.get('input'))[:60]!r}"
        raise UserError(f"{file}: {key}: {first['msg']}{found}") from None
