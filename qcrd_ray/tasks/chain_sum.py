"""Sums and differences of two numbers, made by reasoning-gym: a benchmark that needs no download."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from qcrd_ray.seeding import stable_uniform
from qcrd_ray.tasks.arithmetic import canonical_number, read_number
from qcrd_ray.tasks.base import Choices, Shot, Task

SPLITS = ("test", "valid", "train")
HELD_OUT_SHARE = {"test": 0.3, "valid": 0.15}
_QUESTION = re.compile(r"(-?\d+)\s*([-+])\s*(\d+)")


@dataclass(frozen=True)
class GeneratedQuestion:
    id: str
    question: str
    answer: str


class ChainSum(Task):
    name = "chain_sum"
    has_script = True
    shots = (
        Shot("What is 24 + 13?", "20 + 10 = 30, 4 + 3 = 7, 30 + 7 = 37.", "37"),
        Shot("What is 58 - 21?", "58 - 20 = 38, 38 - 1 = 37.", "37"),
        Shot("What is 7 + 9?", "7 + 9 = 16.", "16"),
        Shot("What is 15 - 40?", "40 - 15 = 25, and 15 is less than 40, so -25.", "-25"),
    )

    def canonical_answer(self, text: str, choices: Choices = None) -> str | None:
        value = read_number(text)
        return None if value is None else canonical_number(value)

    def generate_questions(self, split: str, count: int, seed: int) -> Iterator[GeneratedQuestion]:
        """`count` questions of a split; no question is in two splits, whatever their sizes.

        Raises:
            ValueError: an unknown split, or more questions than there are.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
        found: dict[str, str] = {}
        for expression, answer in _expressions(seed):
            if expression not in found and _split_of(expression, seed) == split:
                found[expression] = answer
                yield GeneratedQuestion(f"chain_sum-{split}-{len(found) - 1:05d}", f"What is {expression}?", answer)
                if len(found) == count:
                    return
        raise ValueError(f"{count} questions asked for {split}, but there are {len(found)} different ones")

    def scripted_rationale(self, question: str, rng: random.Random, slip: bool) -> tuple[str, str]:
        """A worked solution and its answer; with `slip` one step goes wrong and the answer with it.

        Raises:
            ValueError: a question that is no sum or difference of two numbers.
        """
        match = _QUESTION.search(question)
        if match is None:
            raise ValueError(f"no sum or difference of two numbers in {question!r}")
        left, sign, right = int(match[1]), match[2], int(match[3])
        return _worked(left, sign, right, rng, slip)


def _expressions(seed: int) -> Iterator[tuple[str, str]]:
    """An endless-enough stream of reasoning-gym's sums of two numbers of one or two digits."""
    import reasoning_gym

    size = 50_000
    dataset = reasoning_gym.create_dataset(
        "chain_sum", size=size, seed=seed, min_terms=2, max_terms=2, min_digits=1, max_digits=2
    )
    for index in range(size):
        entry = dataset[index]
        yield entry["metadata"]["expression"], entry["answer"]


def _split_of(expression: str, seed: int) -> str:
    """Each expression belongs to one split, by a hash."""
    draw = stable_uniform(seed, "split", expression)
    if draw < HELD_OUT_SHARE["test"]:
        return "test"
    return "valid" if draw < HELD_OUT_SHARE["test"] + HELD_OUT_SHARE["valid"] else "train"


def _slips(left: int, sign: str, right: int, result: int) -> list[int]:
    """Wrong results of a step that people write: never negative, never the right one."""
    slips = [result - 1, result + 1, left - right if sign == "+" else left + right]
    ones = left % 10 + right % 10 if sign == "+" else left % 10 - right % 10
    if ones > 9:
        slips.append(result - 10)  # a carry forgotten
    elif ones < 0:
        slips.append(result + 10)  # a borrow forgotten
    if result % 10:
        slips.append(int(str(abs(result))[::-1]))  # the digits turned round
    return [slip for slip in slips if slip >= 0 and slip != result]


class _Steps:
    """Writes steps `a + b = c`; the one that slips is off by a typical mistake, and what follows goes on from it."""

    def __init__(self, rng: random.Random, slips_at: int | None) -> None:
        self.rng = rng
        self.slips_at = slips_at
        self.lines: list[str] = []

    def do(self, left: int, sign: str, right: int) -> int:
        result = left + right if sign == "+" else left - right
        if len(self.lines) == self.slips_at:
            result = self.rng.choice(_slips(left, sign, right, result))
        self.lines.append(f"{left} {sign} {right} = {result}")
        return result


def _worked(left: int, sign: str, right: int, rng: random.Random, slip: bool) -> tuple[str, str]:
    way = rng.randrange(3)
    negative = sign == "-" and left < right
    first, second = (right, left) if negative else (left, right)
    tens, ones = second // 10 * 10, second % 10
    in_parts = first >= 10 and second >= 10 and (sign == "+" and way != 1)
    count = 3 if in_parts else 2 if tens and ones else 1
    steps = _Steps(rng, rng.randrange(count) if slip else None)
    if in_parts:
        high = steps.do(first // 10 * 10, sign, tens)
        low = steps.do(first % 10, sign, ones)
        result = steps.do(high, "+", low)
    elif count == 2:
        result = steps.do(steps.do(first, sign, tens), sign, ones)
    else:
        result = steps.do(first, sign, second)
    answer = -result if negative else result
    opening = rng.choice(["", "", f"{left} {sign} {right}: ", "Step by step: "])
    text = opening + ", ".join(steps.lines) + "."
    if negative:
        text += f" {left} is less than {right}, so {answer}."
    return text, str(answer)
