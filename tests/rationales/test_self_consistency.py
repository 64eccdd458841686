from __future__ import annotations

import random

import pytest

from qcrd_ray.config import ExperimentConfig, config_from_dict
from qcrd_ray.rationales.schema import Question, TeacherSample
from qcrd_ray.rationales.self_consistency import Dropped, RationaleSet, build_rationale_set, order_samples, vote
from qcrd_ray.tasks import get_task


def sample(answer: str | None, rationale: str | None = None, target: str | None = None) -> TeacherSample:
    return TeacherSample(rationale=rationale or f"so {answer}", answer=answer, target=target)


def same_number(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return False


def number(text: str) -> str | None:
    try:
        return repr(float(text))
    except ValueError:
        return None


def test_most_frequent_answer_wins_by_equality() -> None:
    result = vote([sample("7"), sample("8"), sample("8.0"), sample(None), sample("9")], same_number)
    assert result is not None
    assert result.label == "8"
    assert result.positives == ("so 8", "so 8.0")
    assert result.negatives == ("so 7", "so 9")
    assert result.agreement == 0.5


def test_tie_goes_to_the_lowest_index() -> None:
    result = vote([sample(None), sample("3"), sample("2"), sample("2"), sample("3.0")], same_number)
    assert result is not None
    assert result.label == "3"
    assert result.agreement == 0.5


def test_answer_that_equals_nothing_does_not_vote() -> None:
    result = vote([sample("many"), sample("many"), sample("4")], same_number)
    assert result is not None
    assert (result.label, result.negatives, result.agreement) == ("4", (), 1.0)
    assert vote([sample("many"), sample(None)], same_number) is None
    assert vote([], same_number) is None


def test_label_is_in_target_form_where_a_winner_has_one() -> None:
    result = vote([sample("42"), sample("42.0", target="( 84 / 2 )"), sample("1", target="( 1 )")], same_number)
    assert result is not None
    assert result.label == "( 84 / 2 )"
    assert result.answer == "42"


def test_canonical_and_predicate_agree_on_random_samples() -> None:
    generator = random.Random(5)
    forms = ["1", "1.0", "2", "02", "3", "none", None]
    for _ in range(300):
        samples = [sample(generator.choice(forms), str(i)) for i in range(generator.randint(0, 9))]
        assert vote(samples, same_number) == vote(samples, same_number, canonical=number)


def test_canonical_needs_no_comparisons() -> None:
    def never(a: str, b: str) -> bool:
        raise AssertionError("compared")

    result = vote([sample(str(i)) for i in range(2000)], never, canonical=number)
    assert result is not None
    assert result.agreement == 1 / 2000


def test_order_depends_on_neither_file_order_nor_answer() -> None:
    samples = [sample(str(i % 3), f"rationale {i}") for i in range(10)]
    ordered = order_samples(samples, "q", 0)
    shuffled = random.Random(1).sample(samples, len(samples))
    assert order_samples(shuffled, "q", 0) == ordered
    other_answers = [sample("right" if i < 5 else "wrong", f"rationale {i}") for i in range(10)]
    assert [s.rationale for s in order_samples(other_answers, "q", 0)] == [s.rationale for s in ordered]
    assert order_samples(samples, "another", 0) != ordered
    assert order_samples(samples, "q", 1) != ordered


def test_order_of_one_text_with_two_answers_does_not_depend_on_the_file() -> None:
    twins = [sample("1", "same"), sample("2", "same"), sample("1", "same")]
    assert order_samples(twins, "q", 0) == order_samples(twins[::-1], "q", 0)


def config(**keys: object) -> ExperimentConfig:
    return config_from_dict({"task": "svamp", **keys})


QUESTION = Question(id="q", question="How many?", answer="42", target="( 84.0 / 2.0 )")
SAMPLES = [sample("41", "a"), sample("( 40.0 + 1.0 )", "b"), sample("42", "c"), sample(None, "d"), sample("41", "e")]


def build(
    question: Question = QUESTION, samples: list[TeacherSample] | None = None, **keys: object
) -> RationaleSet | Dropped:
    chosen = config(**keys)
    return build_rationale_set(question, SAMPLES if samples is None else samples, get_task(chosen), chosen)


def test_row_by_vote_with_gold_labels() -> None:
    row = build()
    assert isinstance(row, RationaleSet)
    assert row.label == "( 84.0 / 2.0 )"
    assert row.positives == ("a", "b", "e")
    assert row.negatives == ("c",)
    assert row.agreement == 0.75
    assert row.votes_gold is False
    assert (row.sample0, row.sample0_label) == ("a", "41")


def test_positives_by_gold() -> None:
    row = build(positives="gold")
    assert isinstance(row, RationaleSet)
    assert (row.positives, row.negatives) == (("c",), ("a", "b", "e"))


def test_labels_of_the_teacher() -> None:
    by_vote, by_sample = build(labels="teacher_vote"), build(labels="teacher_sample")
    assert isinstance(by_vote, RationaleSet)
    assert isinstance(by_sample, RationaleSet)
    assert by_vote.label == "41"
    assert by_sample.label == "41"


def test_only_the_first_samples_vote_and_positives_are_bounded() -> None:
    row = build(teacher={"samples": 3}, data={"max_positives": 1})
    assert isinstance(row, RationaleSet)
    assert row.positives == ("a",)
    assert row.agreement == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("question", "samples", "keys", "reason"),
    [
        (QUESTION, [], {}, "no_samples"),
        (QUESTION, [sample(None)], {}, "no_parsed_answer"),
        (Question("q", "How many?"), SAMPLES, {}, "no_gold_answer"),
        (QUESTION, [sample("41")], {"positives": "gold"}, "no_positive"),
        (QUESTION, [sample(None), sample("42")], {"labels": "teacher_sample"}, "sample_0_unparsed"),
    ],
)
def test_unusable_question_is_dropped_with_its_reason(
    question: Question, samples: list[TeacherSample], keys: dict[str, object], reason: str
) -> None:
    assert build(question, samples, **keys) == Dropped(reason)  # type: ignore[arg-type]


def test_gold_labels_alone_need_no_samples() -> None:
    row = build(samples=[], method="finetune")
    assert isinstance(row, RationaleSet)
    assert (row.label, row.positives, row.agreement) == ("( 84.0 / 2.0 )", (), None)
