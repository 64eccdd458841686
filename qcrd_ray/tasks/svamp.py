"""SVAMP: arithmetic word problems. The student writes an equation, its value is what counts."""

from __future__ import annotations

import re

from qcrd_ray.tasks.arithmetic import canonical_number, evaluate, read_number
from qcrd_ray.tasks.base import Choices, Shot, Task


class Svamp(Task):
    name = "svamp"
    instruction = (
        "Solve the problem. Reason step by step, then end with: The answer is EQUATION. "
        "EQUATION is arithmetic in parentheses over the numbers of the problem, such as (12 - 5)."
    )
    shots = (
        Shot(
            "Nora picked 14 plums in the morning and 9 in the afternoon. She gave 6 of them to her aunt. "
            "How many plums does she have left?",
            "Nora picked 14 + 9 plums, which is 23. She gave 6 away, so 23 - 6 = 17 are left.",
            "((14 + 9) - 6)",
        ),
        Shot(
            "A hall has 18 rows with 25 chairs in each row. The stage is 7 meters wide. How many chairs are there?",
            "Each of the 18 rows has 25 chairs. The width of the stage does not matter. 18 * 25 = 450.",
            "(18 * 25)",
        ),
        Shot(
            "Theo read 96 pages in 4 days, the same number each day. How many pages did he read a day?",
            "96 pages over 4 days are 96 / 4 pages a day, which is 24.",
            "(96 / 4)",
        ),
        Shot(
            "A bakery made 120 rolls. It sold 45 before noon and some after noon. 30 are left. "
            "How many did it sell after noon?",
            "120 rolls less the 30 that are left were sold: 120 - 30 = 90. Of these 45 were sold before noon, "
            "so 90 - 45 = 45 after noon.",
            "((120 - 30) - 45)",
        ),
        Shot(
            "Ida has 35 stamps. That is 12 fewer than Bo has. How many stamps does Bo have?",
            "Ida has 12 fewer than Bo, so Bo has 12 more than Ida: 35 + 12 = 47.",
            "(35 + 12)",
        ),
    )

    def student_input(self, question: str, choices: Choices = None) -> str:
        return question.strip()

    def canonical_answer(self, text: str, choices: Choices = None) -> str | None:
        value = read_number(text)
        return None if value is None else canonical_number(value)

    def _answer_and_target(self, written: str, choices: Choices) -> tuple[str | None, str | None]:
        value = read_number(written)
        answer = None if value is None else canonical_number(value)
        is_equation = evaluate(written) is not None and re.search(r"\d\s*\)*\s*[-+*/]", written) is not None
        return answer, written if is_equation else None
