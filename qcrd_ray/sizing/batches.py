"""How long the batches of a run are: those of its own data where it can be read, else those of the config's limits."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.models.student import Item, Student, cut_into_passes
from qcrd_ray.sizing.shapes import known_config
from qcrd_ray.tasks.prompts import SEPARATOR_TOKENS

ROWS_LOOKED_AT = 2000
STEPS_LOOKED_AT = 200
OFFLINE_TEACHERS = ("recorded", "scripted")


@dataclass(frozen=True)
class Question:
    """Token ids of one question; only their numbers matter."""

    prompt: list[int]
    label: list[int]
    rationales: list[list[int]]
    minority: int


@dataclass(frozen=True)
class Batches:
    """The questions of each worker and step that was looked at.

    Attributes:
        source: what the lengths were taken from, for a person.
        vocabulary: of a scratch student's tokenizer; None for the others.
    """

    shares: list[list[Question]]
    source: str
    vocabulary: int | None = None


def batches_at_limits(config: ExperimentConfig, prompt: int, rationale: int, label: int, source: str) -> Batches:
    """A batch in which every question is as long as it may be."""
    share = -(-config.train.batch_size // config.train.workers)
    texts = config.teacher.samples if config.data.max_positives is None else config.data.max_positives
    one = Question([5] * prompt, [5] * label, [[5] * rationale] * texts, 0)
    return Batches([[one] * share], source)


def batches_of(config: ExperimentConfig, lengths: tuple[int, int, int] | None = None) -> Batches:
    """The batches of a config.

    Args:
        lengths: tokens of a prompt, a rationale and a label, to size a batch of such questions.

    Raises:
        UserError: data that the config names, that are there and that are wrong.
    """
    limits = config.student
    if lengths is not None:
        return batches_at_limits(config, *lengths, "the lengths that were given")
    label = limits.max_label_tokens
    if config.method == "single_task":
        label += limits.max_rationale_tokens + SEPARATOR_TOKENS
    at_limits = (limits.max_input_tokens, limits.max_rationale_tokens, label)
    path = config.data.path
    there = path is not None and (path.startswith("generated:") or Path(path).exists())
    if not there or config.teacher.engine not in OFFLINE_TEACHERS:
        return batches_at_limits(config, *at_limits, "the config's limits")
    found = _batches_of_data(config)
    return found or batches_at_limits(config, *at_limits, "the config's limits (no tokenizer on this machine)")


def _batches_of_data(config: ExperimentConfig) -> Batches | None:
    """None where the student's tokenizer is not to be had."""
    from qcrd_ray.models.named import local_model
    from qcrd_ray.models.scratch import train_tokenizer
    from qcrd_ray.rationales.streaming import StreamSpec, read_steps
    from qcrd_ray.ray_session import ray_session
    from qcrd_ray.run_folder import DATA, TOKENIZER, RunFolder
    from qcrd_ray.sampling.teacher import prepare_tables
    from qcrd_ray.tasks.prompts import load_tokenizer
    from qcrd_ray.training.initial_models import task_texts

    limit = min(config.data.limit or ROWS_LOOKED_AT, ROWS_LOOKED_AT)
    judge = config.judge.model_copy(update={"augmentation": "none"})
    looked_at = config.model_copy(update={"data": config.data.model_copy(update={"limit": limit}), "judge": judge})
    scratch = config.student.model.startswith("scratch:")
    with tempfile.TemporaryDirectory(prefix="qcrd_ray-sizing-") as folder:
        run = RunFolder(folder, "sizing")
        if not scratch:
            try:
                tokenizer = load_tokenizer(local_model(run, config.student.model), config.student).tokenizer
            except (OSError, ValueError):
                return None
        run.create()
        # Tables are made by Ray Data. A Ray that is not ended here would be taken for the run's own.
        with ray_session(1, False):
            prepare_tables(looked_at, run.working_folder(DATA))
            if scratch:
                tokenizer = train_tokenizer(task_texts(config, run))
            with run.new_folder(TOKENIZER) as place:
                tokenizer.save_pretrained(place)
                known_config(config.student.model, config.student).save_pretrained(place)
            shares = []
            for rank in range(config.train.workers):
                spec = StreamSpec(run, config, rank, config.train.workers)
                steps = range(min(config.train.max_steps, STEPS_LOOKED_AT))
                for step in read_steps(steps, spec).to_pylist():
                    shares.append([_question(row) for row in step["rows"]])
    return Batches([share for share in shares if share], "the config's data", len(tokenizer) if scratch else None)


def _question(row: dict[str, Any]) -> Question:
    # Equal rationales of a question are computed once.
    rationales = [list(ids) for ids in dict.fromkeys(tuple(ids) for ids in row["positives"])] or [row["first"]]
    return Question(row["explain"], row["label"], rationales, len(row["minority"]))


def gradient_passes(student: Student, config: ExperimentConfig, share: Sequence[Question]) -> list[list[Item]]:
    """The passes with gradients of a share, of the longest rationales that may be chosen."""
    labels = [Item(question.prompt, [question.label]) for question in share]
    every = config.is_contrastive and not _chooses(config)
    found = [(question, _targets(config, question, every=every)) for question in share]
    rationales = [Item(question.prompt, targets) for question, targets in found if targets]
    groups = [labels, rationales] if config.couples_tasks else [[*labels, *rationales]]
    return [p for group in groups for p in cut_into_passes(student, group, config.train.tokens_per_pass, split=False)]


def choice_passes(student: Student, config: ExperimentConfig, share: Sequence[Question]) -> list[list[Item]]:
    """The passes without gradients, over all rationales of a share."""
    if not config.is_contrastive or not _chooses(config):
        return []
    items = []
    for question in share:
        targets = _targets(config, question, every=True)
        items.append(Item(question.prompt, targets, targets))
    return cut_into_passes(student, items, config.train.tokens_per_pass, split=True)


def _chooses(config: ExperimentConfig) -> bool:
    return config.scheme not in ("mean", "weighted_mean")


def _targets(config: ExperimentConfig, question: Question, every: bool) -> list[list[int]]:
    if not config.uses_rationales or config.method == "single_task":
        return []
    limit = config.student.max_rationale_tokens
    negative = [5] * min(limit, config.negatives.max_tokens or limit)
    if not config.is_contrastive:
        return [max(question.rationales, key=len)]
    positives = question.rationales if every else [max(question.rationales, key=len)]
    negatives = config.sampled_negatives if every else min(1, config.sampled_negatives)
    return [*positives, *[negative] * negatives]


def judged_tokens(config: ExperimentConfig, batches: Batches) -> tuple[int, int]:
    """(pairs, tokens of a pair) of the largest pass of the discriminator's training."""
    together = max(1, config.train.tokens_per_pass // (config.judge.max_tokens * 4))
    pairs, tokens = 1, 1
    for share in batches.shares:
        size = min(together, max(len(share), -(-config.judge.pretrain_batch_size // config.train.workers)))
        for question in share:
            pairs = max(pairs, size * 2 * len(question.rationales))
            longest = max(len(rationale) for rationale in question.rationales)
            tokens = max(tokens, min(config.judge.max_tokens, len(question.prompt) + longest + 3))
    return pairs, tokens
