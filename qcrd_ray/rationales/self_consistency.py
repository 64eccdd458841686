"""The vote over a teacher's samples (section 3.2.1), and the rationale set that it makes of a question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.rationales.near_duplicates import without_near_duplicates
from qcrd_ray.rationales.schema import Question, TeacherSample
from qcrd_ray.seeding import stable_hash
from qcrd_ray.tasks import Task

DropReason = Literal["no_samples", "no_parsed_answer", "no_gold_answer", "no_positive", "sample_0_unparsed"]


@dataclass(frozen=True)
class Vote:
    """What a teacher's samples agree on.

    Attributes:
        label: the winning answer in the student's form where one of its samples has that, else as its answer.
        positives: rationales of the samples with the winning answer, by sample index.
        negatives: rationales of the other parsed samples (the minority), by sample index.
        agreement: votes of the winner over parsed samples, in (0, 1].
        answer: the winning answer as its first sample has it.
        groups: for each sample the index of the first sample with an equal answer, -1 where it is unparsed.
        winner: the group that won.
    """

    label: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    agreement: float
    answer: str
    groups: tuple[int, ...]
    winner: int


@dataclass(frozen=True)
class RationaleSet:
    """A row of `rationale_sets`."""

    id: str
    question: str
    choices: tuple[str, ...] | None
    answer: str | None
    label: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    agreement: float | None
    votes_gold: bool | None
    sample0: str
    sample0_label: str | None


@dataclass(frozen=True)
class Dropped:
    """A question that cannot be used, and why."""

    reason: DropReason


def order_samples(samples: Sequence[TeacherSample], question_id: str, seed: int) -> list[TeacherSample]:
    """Put recorded samples in the order that decides their `sample_index`.

    Files in the wild are sorted, some of them right-first, and the first sample breaks ties and is the one that DSS
    learns from. So a seeded hash of the id and the text decides, never the place in the file and never the answer;
    only samples of one and the same text are told apart by a hash of all they say.
    """

    def by_text(sample: TeacherSample) -> int:
        return stable_hash(seed, question_id, sample.rationale)

    def by_all(sample: TeacherSample) -> tuple[int, int]:
        whole = stable_hash(seed, question_id, sample.rationale, sample.answer, sample.target, sample.teacher)
        return by_text(sample), whole

    texts = {sample.rationale for sample in samples}
    return sorted(samples, key=by_text if len(texts) == len(samples) else by_all)


def vote(
    samples: Sequence[TeacherSample],
    same_answer: Callable[[str, str], bool],
    canonical: Callable[[str], str | None] | None = None,
) -> Vote | None:
    """Vote: the positives are the samples whose answer is the most frequent one.

    A tie goes to the answer with the lowest sample index. A sample without an answer, or with one that does not even
    equal itself (an equation that does not parse), never votes and is neither positive nor negative.

    Args:
        samples: by sample index.
        same_answer: whether two answers are equal.
        canonical: a form that equal answers share, None for an answer that equals nothing. With it the vote takes
            time linear in the samples; without it, samples times different answers.

    Returns:
        None where no sample has an answer.
    """
    groups = _group(samples, same_answer, canonical)
    votes: dict[int, int] = {}
    for group in groups:
        if group >= 0:
            votes[group] = votes.get(group, 0) + 1
    if not votes:
        return None
    winner = max(votes, key=lambda group: (votes[group], -group))
    won = [sample for sample, group in zip(samples, groups, strict=True) if group == winner]
    answer = samples[winner].answer
    assert answer is not None
    return Vote(
        label=next((sample.target for sample in won if sample.target), answer),
        positives=tuple(sample.rationale for sample in won),
        negatives=tuple(s.rationale for s, group in zip(samples, groups, strict=True) if group not in (winner, -1)),
        agreement=votes[winner] / sum(votes.values()),
        answer=answer,
        groups=tuple(groups),
        winner=winner,
    )


def _group(
    samples: Sequence[TeacherSample],
    same_answer: Callable[[str, str], bool],
    canonical: Callable[[str], str | None] | None,
) -> list[int]:
    groups: list[int] = []
    first_of: dict[str, int] = {}
    representatives: list[tuple[int, str]] = []
    for index, sample in enumerate(samples):
        group = -1
        if sample.answer is not None and canonical is not None:
            form = canonical(sample.answer)
            group = -1 if form is None else first_of.setdefault(form, index)
        elif sample.answer is not None and same_answer(sample.answer, sample.answer):
            group = next((first for first, answer in representatives if same_answer(answer, sample.answer)), index)
            if group == index:
                representatives.append((index, sample.answer))
        groups.append(group)
    return groups


@dataclass(frozen=True)
class Tally:
    """How one question's voted samples stand, for the counts.

    Attributes:
        samples: voted samples, unparsed ones among them.
        parsed: samples with an answer.
        right: samples whose answer is gold; None without a gold answer.
        majority: samples with the winning answer.
        agreement: of the vote, None without one.
        votes_gold: whether the winner is gold; None without a gold answer or without a vote.
        near_duplicates: positives that were left out as too similar to an earlier one.
    """

    samples: int
    parsed: int
    right: int | None
    majority: int
    agreement: float | None
    votes_gold: bool | None
    near_duplicates: int = 0


def build_rationale_set(
    question: Question, samples: Sequence[TeacherSample], task: Task, config: ExperimentConfig
) -> RationaleSet | Dropped:
    """Vote over a question's samples and make the row that a student learns from.

    Args:
        samples: by sample index; the first `teacher.samples` are voted.
    """
    return vote_and_tally(question, samples, task, config)[0]


def vote_and_tally(
    question: Question, samples: Sequence[TeacherSample], task: Task, config: ExperimentConfig
) -> tuple[RationaleSet | Dropped, Tally]:
    """`build_rationale_set`, and what the counts want to know of a question even where it is dropped."""
    samples = samples[: config.teacher.samples]
    choices = question.choices

    forms: dict[str, str | None] = {}

    def canonical(text: str) -> str | None:
        if text not in forms:
            forms[text] = task.canonical_answer(text, choices)
        return forms[text]

    result = vote(samples, lambda a, b: task.same_answer(a, b, choices), canonical)
    gold = question.answer if question.answer is not None else question.target
    gold_form = canonical(gold) if gold is not None else None
    right: list[bool] | None = None
    votes_gold: bool | None = None
    if gold_form is not None:
        right = [sample.answer is not None and canonical(sample.answer) == gold_form for sample in samples]
        votes_gold = right[result.winner] if result is not None else None
    tally = Tally(
        samples=len(samples),
        parsed=sum(group >= 0 for group in result.groups) if result is not None else 0,
        right=sum(right) if right is not None else None,
        majority=len(result.positives) if result is not None else 0,
        agreement=result.agreement if result is not None else None,
        votes_gold=votes_gold,
    )

    needs_samples = config.needs_samples or (config.data.unanswered == "drop" and config.teacher.engine == "recorded")
    if needs_samples and not samples:
        return Dropped("no_samples"), tally
    if needs_samples and result is None:
        return Dropped("no_parsed_answer"), tally
    if gold_form is None and (config.labels == "gold" or config.positives == "gold"):
        return Dropped("no_gold_answer"), tally

    sample0_label = _student_form(samples[0]) if result is not None and result.groups[0] == 0 else None
    if sample0_label is None and (config.labels == "teacher_sample" or config.method == "single_task"):
        return Dropped("sample_0_unparsed"), tally

    positives: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    if result is not None and config.positives == "gold":
        assert right is not None
        parsed = [group >= 0 for group in result.groups]
        positives = tuple(s.rationale for s, ok in zip(samples, right, strict=True) if ok)
        negatives = tuple(s.rationale for s, p, ok in zip(samples, parsed, right, strict=True) if p and not ok)
    elif result is not None and config.positives == "first":
        positives = (samples[0].rationale,)
    elif result is not None:
        positives, negatives = result.positives, result.negatives
    if config.uses_rationales and not positives:
        return Dropped("no_positive"), tally

    if config.labels == "gold":
        label = task.default_target(question.answer, question.target)
    elif config.labels == "teacher_vote":
        assert result is not None
        label = result.label
    else:
        assert sample0_label is not None
        label = sample0_label
    assert label is not None
    distinct = positives
    if config.data.near_duplicates is not None:
        distinct = without_near_duplicates(positives, config.data.near_duplicates)
        tally = replace(tally, near_duplicates=len(positives) - len(distinct))
    row = RationaleSet(
        id=question.id,
        question=question.question,
        choices=choices,
        answer=question.answer if question.answer is not None else question.target,
        label=label,
        positives=distinct[: config.data.max_positives],
        negatives=negatives,
        agreement=tally.agreement,
        votes_gold=votes_gold,
        sample0=samples[0].rationale if samples else "",
        sample0_label=sample0_label,
    )
    return row, tally


def _student_form(sample: TeacherSample) -> str | None:
    return sample.target or sample.answer
