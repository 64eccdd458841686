"""A simulated teacher: worked solutions that a script writes, with slips.

It needs no model and no network, and its rate of slips follows the temperature as a real teacher's does, so that the
whole way can be run and tested anywhere. What it makes says that it is simulated.
"""

from __future__ import annotations

import math
import random

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError
from qcrd_ray.rationales.schema import Question, TeacherSample
from qcrd_ray.seeding import stable_hash
from qcrd_ray.tasks import Task, get_task

NAME = "scripted (simulated)"
_SLIP_RATE = -math.log(1.0 - 0.22) / 0.7
"""Slips with probability 0.22 at temperature 0.7: 3.9 right samples of 5, as in the paper's appendix table 2."""


def slip_probability(temperature: float) -> float:
    """Probability that a sample goes wrong: 0 at temperature 0, 0.22 at 0.7, below 1 always."""
    return 1.0 - math.exp(-_SLIP_RATE * temperature)


class ScriptedTeacher:
    """Makes `teacher.samples` worked solutions of a question; a sample depends on its seed alone."""

    name = NAME
    simulated = True

    def __init__(self, config: ExperimentConfig) -> None:
        """Raises UserError for a task that has no script."""
        if not get_task(config).has_script:
            raise UserError(f"teacher.engine=scripted: task={config.task} has no script; chain_sum has one")
        if config.data.teachers is not None and config.data.teachers != [NAME]:
            raise UserError(f"config key data.teachers: teacher.engine=scripted has one teacher, {NAME!r}")
        self._samples = config.teacher.samples
        self._temperature = config.teacher.temperature
        self._seed = config.teacher.seed
        self.fingerprint = f"{stable_hash(NAME, self._temperature, _SLIP_RATE):016x}"

    def sample(self, task: Task, question: Question) -> list[TeacherSample]:
        return [self._one(task, question, index) for index in range(self._samples)]

    def _one(self, task: Task, question: Question, index: int) -> TeacherSample:
        seed = stable_hash(self._seed, question.id, index, "scripted")
        generator = random.Random(seed)
        slip = generator.random() < slip_probability(self._temperature)
        rationale, answer = task.scripted_rationale(question.question, generator, slip)
        return TeacherSample(
            rationale=rationale,
            answer=answer,
            target=task.default_target(answer, None),
            teacher=NAME,
            temperature=self._temperature,
            seed=seed,
            finish_reason="stop",
            completion_tokens=None,
            fingerprint=self.fingerprint,
        )
