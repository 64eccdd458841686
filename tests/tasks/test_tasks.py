from __future__ import annotations

import json
import random
import time
from fractions import Fraction
from pathlib import Path

import pytest

from qcrd_ray.config import ExperimentConfig, config_from_dict
from qcrd_ray.errors import UserError
from qcrd_ray.tasks import TASKS, get_task
from qcrd_ray.tasks.arithmetic import canonical_number, evaluate
from qcrd_ray.tasks.base import cut_run_on

CHOICES = ["park", "Coloring Book", "bridge", "bridge", "gravity"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("( 84.0 / 2.0 )", 42),
        ("((17 + 15) - 2)", 30),
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20),
        ("-3 - -4", 1),
        ("8 − 3 × 2 ÷ 4", Fraction(13, 2)),
        ("1,200 + .5", Fraction(2401, 2)),
        ("10 / 4 / 5", Fraction(1, 2)),
    ],
)
def test_arithmetic_has_the_value_that_it_says(text: str, value: Fraction) -> None:
    assert evaluate(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "(", ")", "3 +", "(120 /", "1 / 0", "1 / (2 - 2)", "2 ** 3", "9**9**9**9", "nan", "inf", "1e999999", "x + 1",
     "__import__('os')", "1 2", "()", "(" * 10**6, "9" * 10**6, "-" * 150 + "1", "9" * 60, "*".join(["9" * 39] * 2)],
)  # fmt: skip
def test_what_is_no_arithmetic_has_no_value_and_takes_no_time(text: str) -> None:
    begin = time.process_time()
    assert evaluate(text) is None
    assert time.process_time() - begin < 0.5


def test_arithmetic_agrees_with_exact_fractions_on_random_expressions() -> None:
    rng = random.Random(0)

    def make(depth: int) -> tuple[str, Fraction]:
        if depth == 0 or rng.random() < 0.3:
            number = rng.randint(1, 99)
            return str(number), Fraction(number)
        (left, a), (right, b) = make(depth - 1), make(depth - 1)
        sign = rng.choice("+-*/" if b else "+-*")
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[sign]
        return f"( {left} {sign} {right} )", result

    for _ in range(300):
        text, value = make(3)
        assert evaluate(text) == value, text


@pytest.mark.parametrize("same", ["8", "8.0", "( 16.0 / 2.0 )", "$8", "8.", " 8 ", "(8)", "8 apples", "$ 8", "8.00%"])
def test_svamp_answers_are_values(same: str) -> None:
    assert TASKS["svamp"]().same_answer("8", same)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("50%", "50"),
        ("1/2", "0.5"),
        ("1,200", "1200"),
        ("1/3", "0.3333333333"),
        ("-3", "−3"),
        ("0.1", "( 1.0 / 10.0 )"),
        ("-0", "0"),
    ],
)
def test_svamp_numbers_that_are_one(a: str, b: str) -> None:
    assert TASKS["svamp"]().same_answer(a, b)


@pytest.mark.parametrize("other", ["9", "-8", "80", "8.01", "", "eight", "8 9", "(8", "8 ** 1"])
def test_svamp_answers_that_differ_or_are_none(other: str) -> None:
    assert not TASKS["svamp"]().same_answer("8", other)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("12345678901", "12345678901"), ("200000 * 100000", "20000000000"), ("-1 / 20000", "-0.00005"), ("0", "0"),
     ("9.99999999999", "10"), ("2 / 3", "0.6666666667"), ("1 / " + "9" * 35, "0"), ("12345678901.4", "12345678901")],
)  # fmt: skip
def test_a_canonical_number_is_plain_and_reads_back_as_itself(text: str, canonical: str) -> None:
    value = evaluate(text)
    assert value is not None
    assert canonical_number(value) == canonical
    assert TASKS["svamp"]().canonical_answer(canonical) == canonical


def test_canonical_numbers_read_back_as_themselves_at_every_size() -> None:
    rng, svamp = random.Random(1), TASKS["svamp"]()
    for _ in range(2000):
        value = Fraction(rng.randint(-(10**12), 10**12), rng.randint(1, 10 ** rng.randint(0, 20)))
        canonical = canonical_number(value)
        assert svamp.canonical_answer(canonical) == canonical, value
        assert float(canonical) == pytest.approx(float(value), rel=1e-9, abs=1e-30)


def test_whole_numbers_that_differ_in_one_digit_differ() -> None:
    assert not TASKS["svamp"]().same_answer("12345678901", "12345678902")


def test_an_equation_that_does_not_parse_equals_nothing_not_even_itself() -> None:
    svamp = TASKS["svamp"]()
    assert not svamp.same_answer("( 3.0 /", "( 3.0 /")
    assert not svamp.is_correct("( 3.0 /", "( 3.0 /", None)
    assert svamp.is_correct("( 2 * 21 )", "( 84.0 / 2.0 )", "42")
    assert svamp.is_correct("( 84 / 2 )", "( 84.0 / 2.0 )", None)


@pytest.mark.parametrize(
    "same", ["coloring book", "Coloring Book.", "b", "(b)", "B", "B)", "(B) coloring book", "b. coloring book"]
)
def test_a_choice_is_its_text_its_letter_or_both(same: str) -> None:
    assert TASKS["cqa"]().same_answer("coloring book", same, CHOICES)


@pytest.mark.parametrize("other", ["a", "(c) coloring book", "z", "f", "book", "coloring", ""])
def test_what_names_another_choice_or_none_is_not_it(other: str) -> None:
    assert not TASKS["cqa"]().same_answer("coloring book", other, CHOICES)


def test_choices_with_the_same_text_are_one() -> None:
    assert TASKS["cqa"]().same_answer("c", "d", CHOICES)


@pytest.mark.parametrize(
    ("text", "label"),
    [("Entailment.", "entailment"), ("yes", "entailment"), ("it is not possible to tell", "neutral"),
     ("It’s impossible to tell.", "neutral"), ("contradictory", "contradiction"),
     ("No", "contradiction"), ("not entailment", None), ("entailment or neutral", None), ("", None)],
)  # fmt: skip
@pytest.mark.parametrize("name", ["esnli", "anli1"])
def test_inference_labels(name: str, text: str, label: str | None) -> None:
    assert TASKS[name]().canonical_answer(text) == label


def test_an_output_that_runs_on_is_cut_and_taken_apart() -> None:
    parsed = TASKS["svamp"]().parse_teacher_output(
        "Luke scored 84 / 2 = 42. The answer is (84 / 2).\n\nQ: There are 3 cars.\nA: The answer is (3 + 1)."
    )
    assert parsed.rationale == "Luke scored 84 / 2 = 42."
    assert (parsed.answer, parsed.target) == ("42", "(84 / 2)")
    cut = TASKS["svamp"]().parse_teacher_output("First. The answer is (120 /")
    assert (cut.rationale, cut.answer, cut.target) == ("First.", None, None)
    plain = TASKS["svamp"]().parse_teacher_output("The answer is $42.")
    assert (plain.answer, plain.target) == ("42", None)
    choice = TASKS["cqa"]().parse_teacher_output("It must be cold. So the answer is (b).", CHOICES)
    assert (choice.rationale, choice.answer) == ("It must be cold.", "Coloring Book")


@pytest.mark.parametrize(
    ("name", "line", "answer"),
    [("svamp", "**10**.", "10"), ("svamp", "10. She has 10 plums.", "10"), ("svamp", "(2 * 5). That is all.", "10"),
     ("cqa", "(b) coloring book. It fits.", "Coloring Book"), ("cqa", "**B**.", "Coloring Book"),
     ("cqa", "b or c.", None), ("esnli", "neutral. Nothing says so.", "neutral"), ("svamp", "10 or 12.", None)],
)  # fmt: skip
def test_an_answer_may_be_set_in_bold_or_be_followed_by_a_sentence(name: str, line: str, answer: str | None) -> None:
    parsed = TASKS[name]().parse_teacher_output(f"First this. THE ANSWER IS {line}", CHOICES)
    assert (parsed.rationale, parsed.answer) == ("First this.", answer)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_shot_of_a_task_reads_back_as_its_own_answer(name: str) -> None:
    task = TASKS[name]()
    assert len(task.shots) >= 4
    for shot in task.shots:
        parsed = task.parse_teacher_output(f"{shot.rationale} The answer is {shot.answer}.", shot.choices)
        assert parsed.rationale == shot.rationale
        assert parsed.answer is not None
        assert task.same_answer(parsed.answer, shot.answer, shot.choices)
    prompt = task.teacher_prompt("How many?", ["one", "two"])
    assert prompt.endswith("A:")
    assert prompt.count("The answer is") == len(task.shots)
    assert len(task.teacher_messages("How many?")) == 2 * len(task.shots) + 2


def _custom(**settings: str) -> ExperimentConfig:
    return config_from_dict({"task": "custom", "custom": settings})


def test_a_custom_task_has_its_own_template_pattern_and_comparison() -> None:
    task = get_task(
        _custom(template="Frage: {question} {choices}", answer_pattern=r"Antwort: (?P<answer>.*)", compare="number")
    )
    assert task.student_input("Wie {choices} viele?", ["x"]) == "Frage: Wie {choices} viele? (a) x"
    assert task.parse_teacher_output("Eins und eins. Antwort: 2.0", None).answer == "2.0"
    assert task.same_answer("2.0", "( 4 / 2 )")


def test_a_custom_task_reads_no_answer_from_an_invented_question_or_an_empty_group() -> None:
    parsed = get_task(_custom()).parse_teacher_output("One. The answer is 4.\n\nQ: What?\nA: Two. The answer is 9.")
    assert (parsed.rationale, parsed.answer) == ("One.", "4")
    optional = get_task(_custom(answer_pattern=r"x=(?P<answer>\d+)|none"))
    assert optional.parse_teacher_output("none").answer is None
    assert optional.parse_teacher_output("x=3, or none").answer == "3"


@pytest.mark.parametrize(
    "settings",
    [{"answer_pattern": "("}, {"answer_pattern": "x"}, {"template": "no place"}, {"template": "{question} {other}"}],
)
def test_a_custom_task_that_cannot_work_says_why(settings: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"config key custom\."):
        get_task(_custom(**settings))


def test_generated_splits_are_disjoint_repeatable_and_right() -> None:
    task = TASKS["chain_sum"]()
    splits = {
        name: list(task.generate_questions(name, count, 3))
        for name, count in (("train", 500), ("valid", 60), ("test", 200))
    }
    questions = [q.question for split in splits.values() for q in split]
    assert len(set(questions)) == len(questions) == 760
    assert splits["test"] == list(task.generate_questions("test", 300, 3))[:200]
    for question in splits["train"]:
        assert evaluate(question.question.removeprefix("What is ").rstrip("?")) == int(question.answer)


def test_worked_solutions_are_right_without_a_slip_and_wrong_with_one() -> None:
    task = TASKS["chain_sum"]()
    texts = set()
    for question in task.generate_questions("train", 300, 0):
        for sample in range(4):
            rationale, answer = task.scripted_rationale(
                question.question, random.Random(f"{question.id}{sample}"), False
            )
            assert answer == question.answer
            for step in rationale.rstrip(".").split(": ")[-1].split(". ")[0].split(", "):
                left, _, right = step.partition(" = ")
                assert evaluate(left) == evaluate(right), rationale
            _, wrong = task.scripted_rationale(question.question, random.Random(f"{question.id}{sample}"), True)
            assert wrong != question.answer
            texts.add((question.id, rationale))
    assert len(texts) > 2 * 300


def test_a_slip_is_one_wrong_step_that_a_person_could_write() -> None:
    task = TASKS["chain_sum"]()
    for question in task.generate_questions("train", 300, 0):
        for sample in range(4):
            rationale, _ = task.scripted_rationale(question.question, random.Random(f"{question.id}{sample}"), True)
            steps = [step.split(" = ") for step in rationale.rstrip(".").split(": ")[-1].split(". ")[0].split(", ")]
            wrong = [result for left, result in steps if evaluate(left) != evaluate(result)]
            assert len(wrong) == 1, rationale
            assert int(wrong[0]) >= 0, rationale


def test_recorded_outputs_of_a_teacher_are_read(benchmark_data: Path) -> None:
    folder = benchmark_data / "dss" / "svamp"
    outputs = [o for i in (0, 1) for o in json.loads((folder / "llm" / f"train_CoT_{i}.json").read_text())]
    gold = [json.loads(line)["label"] for line in (folder / "svamp_train.json").read_text().strip().split("\n")]
    svamp = TASKS["svamp"]()
    parsed = [svamp.parse_teacher_output(output) for output in outputs]
    answered = [(p.answer, g) for p, g in zip(parsed, gold, strict=True) if p.answer is not None]
    assert len(answered) >= 760
    assert 0.70 <= sum(svamp.same_answer(a, g) for a, g in answered) / 800 <= 0.80


@pytest.mark.parametrize(
    ("name", "teacher", "accuracy"),
    [("svamp", "palm540b", 0.745), ("svamp", "gpt35turbo-mcckd", 0.678), ("cqa", "palm540b", 0.750),
     ("anli1", "palm540b", 0.761), ("esnli", "palm540b", 0.701)],
)  # fmt: skip
def test_recorded_answers_have_their_known_accuracy(
    benchmark_data: Path, name: str, teacher: str, accuracy: float
) -> None:
    task, right, count = TASKS[name](), 0, 0
    for line in (benchmark_data / name / "train.jsonl").read_text().strip().split("\n"):
        record = json.loads(line)
        for sample in record["teacher_samples"]:
            if sample["teacher"] == teacher:
                count += 1
                right += sample["answer"] is not None and task.same_answer(
                    sample["answer"], record["answer"], record.get("choices")
                )
    assert right / count == pytest.approx(accuracy, abs=0.002)


KEPT = "There are 14 + 9 = 23 plums."


@pytest.mark.parametrize(
    "rest",
    [
        "\n\nQ: There are 3 cars.\nA: 3",
        "\nQuestion: And now?",
        "\n\nQuestion 2: And now?",
        "\n**Question:** And now?",
        "\nHuman: And now?",
        "\n\nuser: And now?",
        "\n\nQ",
        "\nAnswer",
        "\nAnswer Choices: (a) one",
        "\n\nProblem: A train leaves.",
        "\n\nNext problem: A train leaves.",
        "\n\nExample 2: A train leaves.",
        "\n\npremise: A man sits.\nhypothesis: A man stands.",
        "\n### Question\nAnd now?",
        "\n\n###\n\nAnother",
        "<|im_end|>\n<|im_start|>user",
        "</s> And now?",
        " [INST] And now?",
        "<end_of_turn>",
        " Q: There are 3 cars. A: 3",
    ],
)
def test_what_runs_on_is_cut(rest: str) -> None:
    assert cut_run_on(KEPT + rest) == KEPT


@pytest.mark.parametrize(
    "text",
    [
        KEPT,
        "Step 1: add.\n\nStep 2: divide.\n\nAnswer: 4",
        "We have two facts.\n\nExplanation:\nThe first is enough.",
        "For example:\n\n- one\n- two\n\n### Step 2\nAdd them.",
        "All that remains is the question:\n\nHow many are left?\n\n3.",
        "P:(-push-ups)\nQ:(-exercises)\nQ is 3.",
        "There were 7 roses.\nHow many did she cut?\nA: She cut 13.",
        "Premise: a man sits.\nHypothesis: he stands.\nThese exclude each other.",
        "The list is [1, 2], and 1 < 2 > 0.",
        "The answer\nAnswer\n4",
        "### Problem analysis\nTwo trains.\n\n### Problem solution\n5",
        "Q: as it was put. It is 4.",
        "<|assistant|>",
    ],
)
def test_what_is_a_rationale_stays(text: str) -> None:
    assert cut_run_on(f"  {text}\n") == text


def test_cutting_takes_linear_time() -> None:
    start = time.process_time()
    for text in (
        "y" + "\n" * 200_000 + "x",
        "a\n" + "*" * 200_000,
        ". " * 100_000 + "Q:",
        "<|a" * 100_000,
        "a\n#" + " " * 200_000,
    ):
        cut_run_on(text)
    assert time.process_time() - start < 2.0
