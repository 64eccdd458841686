"""What a teacher is asked: the task's few-shot prompt or chat, or the user's own template, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError
from qcrd_ray.rationales.schema import Question
from qcrd_ray.sampling.teacher_engine import Prompt
from qcrd_ray.seeding import stable_hash
from qcrd_ray.tasks import Shot, Task, get_task

_SEEDS = 2**31 - 2**20
"""Bound of a question's first seed: some servers take 32 bits only, and sample i has the seed of sample 0 plus i."""


class PromptBuilder:
    """Makes the prompt of a question. A pure function of the config: the same in every process."""

    def __init__(self, config: ExperimentConfig, chat: bool) -> None:
        """
        Args:
            chat: whether the teacher is asked in a chat or continues plain text.

        Raises:
            UserError: a prompt or shots file that cannot be used.
        """
        settings = config.teacher
        self.chat = chat
        self.task: Task = get_task(config)
        if settings.shots_file is not None:
            self.task.shots = _read_shots(Path(settings.shots_file))
        self._template_text = _read(settings.prompt_file, "prompt_file") if settings.prompt_file is not None else None
        self._file = settings.prompt_file
        self._template = _compile(self._template_text, self._file) if self._template_text is not None else None
        self.stop: tuple[str, ...] = (
            tuple(settings.stop) if settings.stop is not None else () if chat else self.task.stop
        )
        self.build(Question("", "", choices=("a", "b")))  # a template that fails does so now

    def build(self, question: Question) -> Prompt:
        """The prompt of a question. Raises UserError where the user's template cannot be rendered."""
        if self._template is not None:
            text = self._render(question)
            return Prompt(messages=(("user", text),)) if self.chat else Prompt(text=text)
        if not self.chat:
            return Prompt(text=self.task.teacher_prompt(question.question, question.choices))
        messages = self.task.teacher_messages(question.question, question.choices)
        return Prompt(messages=tuple((message["role"], message["content"]) for message in messages))

    def _render(self, question: Question) -> str:
        assert self._template is not None
        try:
            return self._template.render(
                question=question.question,
                choices=list(question.choices or ()),
                input=self.task.student_input(question.question, question.choices),
                shots=[_shot_record(shot) for shot in self.task.shots],
                instruction=self.task.instruction,
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"config key teacher.prompt_file: {self._file} cannot be rendered: {error}") from None

    def description(self) -> dict[str, Any]:
        """All that decides a prompt, question apart."""
        sample = self.build(Question("", "{question}", choices=("{choice a}", "{choice b}")))
        return {
            "prompt": "chat" if self.chat else "few_shot",
            "template": self._template_text,
            "example": sample.as_messages() if self.chat else sample.text,
            "shots": [_shot_record(shot) for shot in self.task.shots],
            "stop": list(self.stop),
        }


def question_key(question: Question) -> int:
    """What a stored sample belongs to: the id and what the prompt is made of."""
    choices = question.choices
    return stable_hash(
        "key", question.id, question.question, "none" if choices is None else len(choices), *choices or ()
    )


def first_seed(seed: int, question_id: str) -> int:
    """The seed of sample 0 of a question; sample i has this plus i."""
    return stable_hash(seed, question_id, "teacher") % _SEEDS


def set_fingerprint(description: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that a set's description decides."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def _compile(text: str, file: str | None) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=False
    )
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"config key teacher.prompt_file: {file}:{error.lineno}: {error.message}") from None


def _read(file: str, key: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config key teacher.{key}: {file} not found") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config key teacher.{key}: {file} cannot be read: {error}") from None


def _read_shots(path: Path) -> tuple[Shot, ...]:
    shots = []
    for number, line in enumerate(_read(str(path), "shots_file").splitlines(), start=1):
        if not line.strip():
            continue
        place = f"config key teacher.shots_file: {path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place}: no valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: expected an object with question, rationale and answer")
        for name in ("question", "rationale", "answer"):
            if not isinstance(row.get(name), str):
                raise UserError(f"{place}: {name!r} is missing or no text; expected question, rationale and answer")
        choices = row.get("choices")
        if choices is not None and not (isinstance(choices, list) and all(isinstance(c, str) for c in choices)):
            raise UserError(f"{place}: 'choices' is no list of texts")
        given = tuple(choices) if choices is not None else None
        shots.append(Shot(row["question"], row["rationale"], row["answer"], given))
    return tuple(shots)


def _shot_record(shot: Shot) -> dict[str, Any]:
    return {
        "question": shot.question,
        "rationale": shot.rationale,
        "answer": shot.answer,
        "choices": list(shot.choices or ()),
    }
