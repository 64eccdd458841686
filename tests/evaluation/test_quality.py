"""Measures of rationales, against counts made by hand and slow, obvious references."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from qcrd_ray.config import load_config
from qcrd_ray.errors import UserError
from qcrd_ray.evaluation.quality import Rationale, copying, diversity, measure, stated_answer, summarise
from qcrd_ray.evaluation.rationale_sources import measure_quality
from qcrd_ray.models.scratch import build_scratch
from qcrd_ray.tasks import TASKS

SVAMP, CQA, ESNLI = TASKS["svamp"](), TASKS["cqa"](), TASKS["esnli"]()
CHOICES = ("ice", "ice cream", "a refrigerator", "oven", "car")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She has 14 + 9 = 23 plums, so 23 - 6 = 17 are left.", "17"),
        ("23 - 6 = 17. Therefore, she has 17 plums.", "17"),
        ("He earns $4 - $297 = -$293 (he overspent)", "-293"),
        ("x = 84 / 2\nx = 42\nSo he scored 42 points.", None),  # no arithmetic with a result
        ("84 / 2 = 42, which leaves 3 more to find.", None),  # another number after it
        ("There are 5 fewer.", None),
        ("", None),
        ("84 / 2 = 42. The answer is (84 / 3).", "28"),
    ],
)
def test_the_answer_that_arithmetic_comes_to(text: str, expected: str | None) -> None:
    assert stated_answer(text, SVAMP) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Milk spoils in the warmth. Of the choices only a refrigerator keeps food cold.", "a refrigerator"),
        ("It is not the oven. It is ice cream.", "ice cream"),
        ("It is not the oven but a refrigerator.", None),  # two of them
        ("Nice cars.", None),
        ("So it is (d) oven. The answer is (d) oven.", "oven"),
        ("So it cannot be an oven.", None),
        ("It isn't the oven.", None),
        ("Unlike a car it stands still.", None),
        ("Only ovens are hot, and a car is not.", None),
        ("Of the two only ovens hold a car.", None),  # either may be meant
        ("Refrigerators and cars are machines, an oven too.", None),
        ("They sell nice creams and an oven.", "oven"),
        ("It is in plastic and refrigeration, never an oven.", None),
        ("", None),
    ],
)
def test_the_choice_that_a_rationale_names(text: str, expected: str | None) -> None:
    assert stated_answer(text, CQA, CHOICES) == expected


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        ("It is cold, so no.", ("yes", "no"), "no"),
        ("It is cold, so it is not no.", ("yes", "no"), None),
        ("Only eastern united states are there.", ("state", "eastern united states"), "eastern united states"),
        ("You find it in big cities.", ("city", "big cities"), "big cities"),
        ("It is only a plan.", ("online", "planet", "plan"), "plan"),
    ],
)
def test_a_choice_is_named_by_its_own_words(text: str, choices: tuple[str, ...], expected: str | None) -> None:
    assert stated_answer(text, CQA, choices) == expected


def test_a_rationale_without_a_form_of_its_answer_names_none() -> None:
    assert stated_answer("A beach is outside, so the dog is outside: an entailment.", ESNLI) is None
    assert stated_answer("It is outside. The answer is entailment.", ESNLI) == "entailment"


@pytest.mark.parametrize(
    ("text", "label", "contradicts"),
    [
        ("84 / 2 = 42.", "( 84.0 / 2.0 )", False),
        ("84 / 2 = 42.", "42", False),
        ("84 / 2 = 42.", "( 84.0 - 2.0 )", True),
        ("84 / 2 = 43.", "( 84.0 / 2.0 )", True),
        ("10 / 3 = 3.33.", "( 10.0 / 3.0 )", False),
        ("810 / 664 = 1.22.", "1.21988", False),
        ("10 / 3 = 3.33.", "3.3", False),
        ("10 / 3 = 3.33.", "3.4", True),
        ("133 / 19 = 6.95.", "7", True),  # another answer, though near
        ("84 / 2 = 42.", "what?", None),
        ("84 / 2 = 42.", None, None),
        ("He divides.", "42", None),
        # What stands behind the last equals sign is no result yet.
        ("8 - 3 = 5, total = 5 + 5.", "10", None),
        ("2 + 3 = 5. The total is 10 = 5 + 5.", "10", None),
        ("1 / 3 + 2 / 3 = 3/3", "1", None),
        ("3 * 2 = 3 + 3", "6", None),
        ("15 / 60 = 25%", "0.25", None),
        ("12 + 8 = 20. 20 dozens", "240", None),
        ("12 + 8 = 20, so 20 - a dozen is too few.", "21", True),
    ],
)
def test_a_contradiction_of_the_label(text: str, label: str | None, contradicts: bool | None) -> None:
    assert measure(Rationale("q", "?", text, label), SVAMP).contradicts is contradicts


def test_copying_by_hand() -> None:
    question = "Nora picked 14 plums in the morning and 9 in the afternoon."
    # nora picked 14 plums | picked 14 plums so: one of two 4-grams; longest run nora picked 14 plums
    assert copying("Nora picked 14 plums, so?", question, 4) == (0.5, 4)
    assert copying(question, question, 4) == (1.0, 12)
    assert copying("NORA  picked", question, 4) == (None, 2)
    assert copying("", question, 4) == (None, 0)
    assert copying("Nobody knows this at all.", question, 4) == (0.0, 0)
    assert copying("Nora picked 14 plums", "", 4) == (0.0, 0)


def test_the_longest_copied_run_is_that_of_a_slow_search() -> None:
    rng = random.Random(1)
    for _ in range(300):
        a, b = ([rng.choice("uvwxyz") for _ in range(rng.randint(0, 25))] for _ in range(2))
        runs = [a[i:j] for i in range(len(a)) for j in range(i + 1, len(a) + 1)]
        expected = max(
            (len(run) for run in runs if any(b[k : k + len(run)] == run for k in range(len(b)))),
            default=0,
        )
        assert copying(" ".join(a), " ".join(b))[1] == expected


def test_diversity_by_hand() -> None:
    found = diversity("q", ["one two three", "one two four", "One, two three!"])
    assert found.distinct_1 == pytest.approx(4 / 9)  # one two three four
    assert found.distinct_2 == pytest.approx(3 / 6)  # one-two, two-three, two-four
    assert found.similarity == pytest.approx((0 + 1 + 0) / 3)  # one triple each; the third is the first
    assert found.duplicates == pytest.approx(1 / 3)
    empty = diversity("q", ["", ""])
    assert (empty.distinct_1, empty.distinct_2, empty.duplicates) == (None, None, 0.5)
    with pytest.raises(ValueError, match="1 sample"):
        diversity("q", ["one"])


TEXTS = [
    ("a", "3 + 4 = 7.", "7", "7"),
    ("a", "3 + 4 = 8. 8 - 1 = 7.", "7", "7"),
    ("b", "3 + 4 = 8.", "8", "7"),
    ("b", "Seven, he says.", "9", "7"),
    ("c", "3 + 4 = 7.", "9", None),
    ("c", "", None, "7"),
]


def measured(texts: list[tuple[Any, ...]] = TEXTS) -> list[Any]:
    return [measure(Rationale(i, "What is 3 + 4 ?", text, label, gold), SVAMP) for i, text, label, gold in texts]


def test_a_summary_counts_what_stands_there() -> None:
    summary = summarise(measured())
    assert {key: summary[key] for key in ("rationales", "questions", "empty", "steps", "wrong_steps_found")} == {
        "rationales": 6,
        "questions": 3,
        "empty": 1,
        "steps": 5,
        "wrong_steps_found": 2,
    }
    values = {name: (one["value"], one["n"]) for name, one in summary["measures"].items()}
    assert values["wrong_steps"] == (2 / 5, 5)
    assert values["with_steps"] == (4 / 6, 6)
    assert values["with_wrong_steps"] == (2 / 4, 4)
    assert values["states_answer"] == (4 / 6, 6)
    assert values["contradicts"] == (1 / 4, 4)  # c: 7 beside 9
    assert values["right"] == (2 / 4, 4)
    assert values["words"][0] == pytest.approx((5 + 10 + 5 + 3 + 5) / 6)
    assert "tokens" not in values
    for one in summary["measures"].values():
        assert one["low"] is None or one["low"] <= one["value"] <= one["high"]


def test_an_interval_is_over_questions_and_seeded() -> None:
    rng = random.Random(0)
    once = [(f"q{number}", f"3 + 4 = {rng.choice([7, 7, 8])}.", None, None) for number in range(60)]
    narrow, again = (summarise(measured(once), seed=3)["measures"]["wrong_steps"] for _ in range(2))
    assert narrow == again
    assert narrow["low"] < narrow["value"] < narrow["high"]
    # Ten copies of each sample know no more than one: the interval stays as wide.
    copies = summarise(measured([text for text in once for _ in range(10)]), seed=3)["measures"]["wrong_steps"]
    assert (copies["value"], copies["low"], copies["high"]) == pytest.approx(
        (narrow["value"], narrow["low"], narrow["high"])
    )
    assert copies["n"] == 600
    # About what the normal approximation of a share gives.
    width = 2 * 1.96 * (narrow["value"] * (1 - narrow["value"]) / 60) ** 0.5
    assert narrow["high"] - narrow["low"] == pytest.approx(width, rel=0.25)
    assert summarise(measured([("q", "3 + 4 = 7.", "7", "7")] * 3))["measures"]["right"]["low"] is None
    assert summarise([])["measures"] == {}


ROWS = [
    {
        "id": f"q{number}",
        "question": f"What is {number} + 4?",
        "answer": str(number + 4),
        "teacher_samples": [
            {"teacher": "t", "rationale": f"{number} + 4 = {number + 4}.", "answer": str(number + 4)},
            {"teacher": "t", "rationale": f"{number} + 4 = {number + 5}.", "answer": str(number + 5)},
            {"teacher": "u", "rationale": "By a guess.", "answer": None},
        ],
    }
    for number in range(6)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text(lines)
    return tmp_path


def test_the_teacher_s_recorded_samples(data: Path) -> None:
    settings = ["task=svamp", f"data.path={data}", f"output={data / 'out'}"]
    result = measure_quality(load_config(None, settings))
    assert set(result["writers"]) == {"teacher t", "teacher u"}
    groups = result["writers"]["teacher t"]
    wrong = {name: groups[name]["measures"]["wrong_steps"]["value"] for name in ("all", "right", "wrong")}
    assert wrong == {"all": 0.5, "right": 0.0, "wrong": 1.0}
    assert groups["all"]["measures"]["similarity"]["n"] == 6
    lines = [json.loads(line) for line in (data / "out" / "rationales.jsonl").read_text().splitlines()]
    assert len(lines) == 18
    assert {line["writer"] for line in lines if line["wrong"]} == {"teacher t"}
    few = measure_quality(load_config(None, [*settings[:2], "quality.questions=2"]))
    assert few["questions"] == 2
    # What was written can be measured again.
    file = ["quality.of=file", f"quality.file={data / 'out' / 'rationales.jsonl'}"]
    again = measure_quality(load_config(None, [*settings[:2], *file]))
    assert again["writers"]["file rationales.jsonl"]["all"]["wrong_steps_found"] == groups["all"]["wrong_steps_found"]


def test_a_file_may_be_what_predict_wrote(tmp_path: Path) -> None:
    rows = [{"id": number, "question": f"What is {number} + 4?", "answer": number + 4} for number in range(4)]
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "train.jsonl").write_text((tmp_path / "valid.jsonl").read_text())
    written: list[dict[str, Any]] = [
        {"id": 0, "question": "", "label": "4", "rationale": "0 + 4 = 4."},
        {"error": "questions.jsonl:2: no valid JSON"},
        {"id": 2, "question": "", "label": "", "answer": "6", "rationale": None},
        {"id": 3, "question": "", "label": 8, "rationale": "3 + 4 = 7."},
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    settings = ["task=svamp", f"data.path={tmp_path}", "quality.of=file", f"quality.file={tmp_path}/answers.jsonl"]
    result = measure_quality(load_config(None, [*settings, f"output={tmp_path / 'out'}"]))
    assert result["writers"]["file answers.jsonl"]["errors"] == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "rationales.jsonl").read_text().splitlines()]
    assert [(one["id"], one["label"], one["right"]) for one in lines] == [
        ("0", "4", True),
        ("2", "", False),  # the empty label of a student is its answer, whatever else stands there
        ("3", "8", False),
    ]
    assert [one["contradicts"] for one in lines] == [False, None, True]


@pytest.mark.parametrize(
    ("arguments", "content", "expected"),
    [
        (["evaluation.split=test"], None, "evaluation.split: no 'test'"),
        (["quality.of=file"], None, "needs quality.file"),
        (["quality.of=file", "quality.file=FILE"], None, "no such file"),
        (["quality.of=file", "quality.file=FILE"], '{"id": "q0"}\n', "given.jsonl:1: no 'rationale'; there are: id"),
        (["quality.of=file", "quality.file=FILE"], '{"id": "zz", "rationale": "x"}\n', "none of the 1 rationales"),
        (["quality.of=file", "quality.file=FILE"], '{"id": 3, "rationale": 5}\n', "'rationale': expected a string"),
        (
            ["quality.of=file", "quality.file=FILE"],
            '{"id": "q0", "rationale": "\\ud83d"}\n',
            "half of a surrogate pair",
        ),
        (["output=DATA/train.jsonl"], None, "config key output: "),
        (["quality.of=file", "quality.file=FILE"], "{\n", "given.jsonl:1: no valid JSON"),
        (["quality.samples=2", "quality.of=student"], None, "quality.temperature=0"),
        (["quality.of=student", "student.model=scratch:t5-tiny"], None, "has learned nothing"),
        (["quality.of=student", "student.model=DATA"], None, "student.model: "),
    ],
)
def test_bad_input_is_a_line(data: Path, arguments: list[str], content: str | None, expected: str) -> None:
    file = data / "given.jsonl"
    if content is not None:
        file.write_text(content)
    given = [argument.replace("FILE", str(file)).replace("DATA", str(data)) for argument in arguments]
    with pytest.raises(UserError) as caught:
        measure_quality(load_config(None, ["task=svamp", f"data.path={data}", *given]))
    assert expected in str(caught.value)


@pytest.mark.slow
def test_a_student_s_samples_are_measured(data: Path) -> None:
    folder = build_scratch("llama-tiny", [str(row["question"]) for row in ROWS], data / "student", seed=0)
    settings = [
        "task=svamp",
        f"data.path={data}",
        "quality.of=both",
        f"student.model={folder}",
        "student.max_rationale_tokens=12",
        "sampler.engine=transformers",
        "sampler.precision=fp32",
        "quality.samples=3",
        "quality.temperature=1.0",
    ]
    result, again = (measure_quality(load_config(None, settings))["writers"] for _ in range(2))
    assert result == again
    student = result[f"student {folder}"]["all"]
    assert (student["rationales"], student["questions"]) == (18, 6)
    assert 0 < student["measures"]["tokens"]["value"] <= 12
    assert student["measures"]["similarity"]["value"] < 1.0
    # The teacher's tokens are those of the student's tokenizer, digits one by one: `0 + 4 = 4.` has more than six.
    assert result["teacher t"]["all"]["measures"]["tokens"]["value"] > 6
