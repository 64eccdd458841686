"""What the teacher's vote makes of its samples, and where it is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qcrd_ray.rationales.schema import TeacherSample
from qcrd_ray.rationales.self_consistency import vote
from qcrd_ray.reporting.run_record import RunRecord
from qcrd_ray.tasks import Task, get_task

MOST_LABELS = 8


@dataclass(frozen=True)
class AgreementRow:
    """Questions whose winner has this share of the parsed samples."""

    agreement: float
    right: int
    wrong: int

    @property
    def share(self) -> float:
        return self.right / (self.right + self.wrong)


@dataclass(frozen=True)
class VoteConfusion:
    """
    Attributes:
        questions: with a gold answer and samples, among those that were read.
        first_and_vote: of (first sample is right, vote is right) how many questions.
        labels: gold and voted answers, where they are few; else empty.
        matrix: [gold][voted] questions.
    """

    questions: int
    first_and_vote: dict[tuple[bool, bool], int]
    labels: list[str]
    matrix: list[list[int]]


def agreement_rows(run: RunRecord) -> list[AgreementRow]:
    """Right and wrong votes by agreement, over all training questions, the highest first."""
    right: Counter[float] = Counter()
    wrong: Counter[float] = Counter()
    for agreement, is_gold, questions in run.votes:
        (right if is_gold else wrong)[round(agreement, 2)] += questions
    if len({*right, *wrong}) > 10:  # many samples a question: tenths
        right, wrong = _tenths(right), _tenths(wrong)
    return [AgreementRow(a, right[a], wrong[a]) for a in sorted({*right, *wrong}, reverse=True)]


def _tenths(counts: Counter[float]) -> Counter[float]:
    found: Counter[float] = Counter()
    for agreement, questions in counts.items():
        found[int(agreement * 10 + 1e-9) / 10] += questions
    return found


def vote_confusion(run: RunRecord) -> VoteConfusion | None:
    """The vote against gold and against the first sample; None where no question has samples and a gold answer."""
    if run.config is None:
        return None
    task = get_task(run.config)
    first_and_vote: Counter[tuple[bool, bool]] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for row in run.train:
        found = _voted(task, row, run.samples.get(row["id"], ())[: run.config.teacher.samples])
        if found is not None:
            gold, first, voted = found
            first_and_vote[first == gold, voted == gold] += 1
            pairs[gold, voted or "none"] += 1
    if not pairs:
        return None
    labels = sorted({label for pair in pairs for label in pair}, key=lambda label: (label == "none", label))
    if len(labels) > MOST_LABELS or len({gold for gold, _ in pairs}) < 2 or any(row["choices"] for row in run.train):
        labels = []
    matrix = [[pairs[gold, voted] for voted in labels] for gold in labels]
    return VoteConfusion(sum(pairs.values()), dict(first_and_vote), labels, matrix)


def _voted(
    task: Task, row: dict[str, Any], recorded: Sequence[dict[str, Any]]
) -> tuple[str, str | None, str | None] | None:
    """(gold, the first sample's answer, the vote) in their canonical forms."""
    choices = row["choices"]
    gold = task.canonical_answer(row["answer"], choices) if row["answer"] is not None else None
    if gold is None or not recorded:
        return None
    ordered = sorted(recorded, key=lambda sample: sample["sample_index"])
    samples = [TeacherSample(s["rationale"], s["answer"], s["target"]) for s in ordered]
    forms = [None if s.answer is None else task.canonical_answer(s.answer, choices) for s in samples]
    won = vote(
        samples,
        lambda a, b: task.same_answer(a, b, choices),
        lambda text: task.canonical_answer(text, choices),
    )
    return gold, forms[0], None if won is None else forms[won.winner]
