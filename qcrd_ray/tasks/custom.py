"""A benchmark of the user's own: a template, a way to find the answer, a way to compare."""

from __future__ import annotations

import re

from qcrd_ray.config import TaskConfig
from qcrd_ray.errors import UserError
from qcrd_ray.tasks.arithmetic import canonical_number, read_number
from qcrd_ray.tasks.base import Choices, ParsedSample, Task, canonical_choice, cut_run_on, normalise


class Custom(Task):
    name = "custom"

    def __init__(self, config: TaskConfig) -> None:
        """Raises UserError for a template or a pattern that cannot be used."""
        self.config = config
        try:
            self.pattern = re.compile(config.answer_pattern)
        except re.error as error:
            raise UserError(f"config key custom.answer_pattern: no regular expression: {error}") from None
        if "answer" not in self.pattern.groupindex:
            raise UserError("config key custom.answer_pattern: no group (?P<answer>…) in it")
        left = config.template.replace("{question}", "").replace("{choices}", "")
        if "{question}" not in config.template or "{" in left or "}" in left:
            raise UserError(
                "config key custom.template: expected {question} and perhaps {choices} in it, and no other braces"
            )

    def student_input(self, question: str, choices: Choices = None) -> str:
        if choices and "{choices}" not in self.config.template:
            question = super().student_input(question, choices)
        listed = " ".join(f"({chr(97 + index)}) {choice}" for index, choice in enumerate(choices or ()))
        # One pass, so that a question that says {choices} stays as it is.
        given = {"{question}": question.strip(), "{choices}": listed}
        return re.sub(r"\{question\}|\{choices\}", lambda match: given[match[0]], self.config.template)

    def parse_teacher_output(self, text: str, choices: Choices = None) -> ParsedSample:
        text = cut_run_on(text)
        matches = [match for match in self.pattern.finditer(text) if match["answer"] is not None]
        if not matches:
            return ParsedSample(text, None, None)
        written = matches[-1]["answer"].strip()
        rationale = text[: matches[-1].start()].strip() or text
        answer = written if self.canonical_answer(written, choices) is not None else None
        return ParsedSample(rationale, answer, None)

    def canonical_answer(self, text: str, choices: Choices = None) -> str | None:
        if self.config.compare == "number":
            value = read_number(text)
            return None if value is None else canonical_number(value)
        if self.config.compare == "choice" and choices:
            return canonical_choice(text, choices)
        return normalise(text) or None
