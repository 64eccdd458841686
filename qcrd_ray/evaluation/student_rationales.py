"""Rationales that a student writes for chosen questions, at any temperature, by its own sampling engine."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError
from qcrd_ray.models.exported import STUDENT_FILE, as_trained, check_exported, read_exported
from qcrd_ray.rationales.schema import Question
from qcrd_ray.rationales.sources import SourceRow, read_rows, splits_available
from qcrd_ray.sampling.engine import Generation, Request, SamplingEngine, SamplingParameters, start_engine
from qcrd_ray.sampling.predictions import most_tokens, rationale_and_label
from qcrd_ray.sampling.student_engine import engine_spec
from qcrd_ray.seeding import stable_hash
from qcrd_ray.tasks import get_task
from qcrd_ray.tasks.prompts import EXPLAIN, PREDICT, load_tokenizer

_SEEDS = 2**31 - 2**20
"""Bound of a sample's seed, as for a teacher's."""


@dataclass(frozen=True)
class Written:
    """A rationale that a student wrote.

    Attributes:
        label: what it answered, None where that was not asked for.
        tokens: generated, the end token among them; those of the label too where it writes both in one text.
        cut: whether the limit of tokens ended it.
    """

    rationale: str
    label: str | None
    tokens: int
    cut: bool


def choose_rows(
    config: ExperimentConfig, split: str, count: int | None, seed: int, samples: bool = False
) -> list[SourceRow]:
    """`count` questions of a split that a hash of seed and id chooses (None: all), in the order of that hash.

    A smaller number is a part of a larger one.

    Args:
        samples: whether recorded samples are read with them.

    Raises:
        UserError: no such split, or rows that cannot be read.
    """
    available = splits_available(config)
    if split not in available:
        raise UserError(
            f"config key evaluation.split: no {split!r} in {config.data.path}; there are {', '.join(available)}"
        )
    rows = read_rows(config, get_task(config), split, samples=samples)
    if count is None:
        return list(rows)
    return heapq.nsmallest(count, rows, key=lambda row: (stable_hash(seed, "chosen", row.question.id), row.question.id))


def gold_of(question: Question) -> str | None:
    """The right answer of a question; its target where the data have nothing else."""
    return question.answer if question.answer is not None else question.target


def student_folder(config: ExperimentConfig, key: str, model: str) -> str:
    """Where a student is loaded from. Raises UserError for a folder that is none, with the config key that names it."""
    from qcrd_ray.models.embedded import embedded_student
    from qcrd_ray.models.named import check_student

    if model.startswith("scratch:"):
        raise UserError(f"config key {key}: {model} has learned nothing; give the folder of a trained student")
    if model.startswith("embedded:"):
        return str(embedded_student(model.removeprefix("embedded:")))
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        inner = Path(model) / "student"
        hint = f"; did you mean {inner}?" if (inner / "config.json").is_file() else ""
        raise UserError(f"config key {key}: {model} is no student folder (no config.json in it){hint}")
    try:
        check_student(model, config.student)
    except UserError as error:
        raise UserError(str(error).replace("config key student.model", f"config key {key}", 1)) from None
    return model


def explaining_student(config: ExperimentConfig, key: str, model: str) -> str:
    """`student_folder` of a student of this task that writes rationales. Raises UserError for another one, too."""
    folder = student_folder(config, key, model)
    if as_trained(config, folder).method == "finetune":
        raise UserError(f"config key {key}: {model} was trained by finetune, which learns no rationales; give another")
    if (Path(folder) / STUDENT_FILE).is_file():
        check_exported(Path(folder), config.student)
        own = read_exported(Path(folder))
        if own.task != config.task:
            raise UserError(f"config key {key}: {model} was trained for task={own.task}, the config says {config.task}")
        if own.custom is not None and own.custom.template != config.custom.template:
            raise UserError(
                f"config key {key}: {model} was trained with custom.template={own.custom.template!r}, the config says "
                f"{config.custom.template!r}"
            )
    return folder


def sample_student(
    config: ExperimentConfig,
    model: str,
    questions: Sequence[Question],
    temperatures: Sequence[float],
    *,
    samples: int = 1,
    top_k: int = 0,
    seed: int = 0,
    labels: bool = False,
) -> list[list[list[Written]]]:
    """[temperatures][questions][samples] rationales of the student in a folder, by an engine that ends with the call.

    A rationale depends on the student, the question, the temperature, its number and the seed, on nothing else.

    Args:
        model: as `student_folder` gives it. How it is asked is what its folder says, else what `config` does.
        labels: whether the student's greedy label of each question is wanted too.
    """
    config = as_trained(with_student(config, model), model)
    engine = start_engine(engine_spec(config, model))
    try:
        task, tokenizer = get_task(config), load_tokenizer(model, config.student)
        single = config.method == "single_task"
        prefix = PREDICT if single else EXPLAIN
        texts = [task.student_input(question.question, question.choices) for question in questions]
        answers: list[str | None] = [None] * len(questions)
        if labels and not single:
            found = _greedy(engine, config, [tuple(tokenizer.prompt(PREDICT, text)[0]) for text in texts])
            answers = [generation.text.strip() for generation in found]
        prompts = [tuple(tokenizer.prompt(prefix, text)[0]) for text in texts]
        written = []
        for temperature in temperatures:
            parameters = SamplingParameters(
                temperature=temperature, top_k=top_k, max_tokens=most_tokens(config, prefix), logprobs=False
            )
            requests = [
                Request(prompt, parameters, _seed(seed, question, temperature, number))
                for prompt, question in zip(prompts, questions, strict=True)
                for number in range(samples)
            ]
            generations = iter([one for [one] in engine.generate(requests)])
            written.append(
                [[_written(config, next(generations), answer) for _ in range(samples)] for answer in answers]
            )
        return written
    finally:
        engine.close()


def with_student(config: ExperimentConfig, model: str) -> ExperimentConfig:
    """A config whose student is the one in a folder, of whatever family."""
    return config.model_copy(update={"student": config.student.model_copy(update={"model": model})})


def _greedy(engine: SamplingEngine, config: ExperimentConfig, prompts: Sequence[tuple[int, ...]]) -> list[Generation]:
    parameters = SamplingParameters(temperature=0.0, max_tokens=most_tokens(config, PREDICT), logprobs=False)
    return [one for [one] in engine.generate([Request(prompt, parameters) for prompt in prompts])]


def _seed(seed: int, question: Question, temperature: float, number: int) -> int:
    return stable_hash(seed, question.id, "rationale", temperature, number) % _SEEDS


def _written(config: ExperimentConfig, generation: Generation, label: str | None) -> Written:
    cut = generation.finish_reason == "length"
    written = Written(generation.text.strip(), label, len(generation.token_ids) + (not cut), cut)
    if config.method == "single_task":
        rationale, answer = rationale_and_label(config, written.rationale)
        if not rationale and cut:  # it has not come to its label
            return replace(written, label=None)
        return replace(written, rationale=rationale, label=answer)
    return written
