"""What a teacher is asked, and which samples belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qcrd_ray.config import config_from_dict
from qcrd_ray.errors import UserError
from qcrd_ray.rationales.schema import Question
from qcrd_ray.sampling.teacher_prompt import PromptBuilder, first_seed, question_key, set_fingerprint

QUESTION = Question("q", "Where is milk kept?", choices=("oven", "fridge"))


def builder(chat: bool, task: str = "cqa", **teacher: Any) -> PromptBuilder:
    return PromptBuilder(config_from_dict({"task": task, "teacher": teacher}), chat)


def test_a_base_model_gets_the_shots_as_text_and_is_stopped_before_the_next_question() -> None:
    made = builder(chat=False)
    text = made.build(QUESTION).text
    assert text is not None
    assert text.endswith("Q: Where is milk kept?\nAnswer Choices: (a) oven (b) fridge\nA:")
    assert text.count("The answer is") == 4
    assert "\nQ:" in made.stop


def test_a_chat_model_gets_turns() -> None:
    made = builder(chat=True)
    messages = made.build(QUESTION).as_messages()
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 4, "user"]
    assert messages[-1]["content"].startswith("Where is milk kept?")
    assert made.stop == ()
    with pytest.raises(ValueError):
        builder(chat=False).build(QUESTION).as_messages()


def test_own_template_and_shots(tmp_path: Path) -> None:
    shots = tmp_path / "shots.jsonl"
    shots.write_text(json.dumps({"question": "1+1?", "rationale": "Two.", "answer": "2"}) + "\n\n")
    file = tmp_path / "prompt.j2"
    file.write_text(
        "{% for shot in shots %}"
        "{{ shot.question }} -> {{ shot.rationale }} The answer is {{ shot.answer }}.\n{% endfor %}"
        "{{ question }} [{{ choices | join(';') }}]"
    )
    for chat in (False, True):
        prompt = builder(chat, prompt_file=str(file), shots_file=str(shots)).build(QUESTION)
        text = prompt.messages[0][1] if prompt.messages else prompt.text
        assert text == "1+1? -> Two. The answer is 2.\nWhere is milk kept? [oven;fridge]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ question", "prompt.j2:1: "),
        ("a\n{% for %}", "prompt.j2:2: "),
        ("{{ answer }}", "'answer' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered: access to attribute '__class__'"),
        ("{% for i in range(999999999) %}x{% endfor %}", "cannot be rendered: Range too big"),
        ("{% include '/etc/passwd' %}", "cannot be rendered"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "prompt.j2"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        builder(False, prompt_file=str(file))
    assert expected in str(caught.value) and "teacher.prompt_file" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "shots.jsonl:1: no valid JSON"),
        ("[]", "shots.jsonl:1: expected an object"),
        ('{"question": "q", "rationale": "r"}', "shots.jsonl:1: 'answer' is missing"),
        ('{"question": "q", "rationale": "r", "answer": "a", "choices": [1]}', "'choices' is no list of texts"),
    ],
)
def test_shots_that_cannot_be_used_are_one_line(tmp_path: Path, line: str, expected: str) -> None:
    file = tmp_path / "shots.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(UserError, match="teacher.shots_file") as caught:
        builder(False, shots_file=str(file))
    assert expected in str(caught.value)
    with pytest.raises(UserError, match="not found"):
        builder(False, shots_file=str(tmp_path / "none.jsonl"))


def test_what_decides_a_prompt_decides_the_fingerprint(tmp_path: Path) -> None:
    shots = tmp_path / "shots.jsonl"
    shots.write_text(json.dumps({"question": "q", "rationale": "r", "answer": "a"}))
    file = tmp_path / "prompt.j2"
    file.write_text("{{ question }}")
    made = [
        builder(False),
        builder(True),
        builder(False, task="svamp"),
        builder(False, stop=["END"]),
        builder(False, shots_file=str(shots)),
        builder(False, prompt_file=str(file)),
    ]
    prints = [set_fingerprint(one.description()) for one in made]
    assert len(set(prints)) == len(prints)
    assert prints[0] == set_fingerprint(builder(False).description())
    copy = tmp_path / "copy.j2"
    copy.write_text("{{ question }}")
    assert set_fingerprint(builder(False, prompt_file=str(copy)).description()) == prints[-1], "the name is no part"


def test_a_question_that_changed_is_another_one() -> None:
    same = question_key(Question("a", "text", answer="1", choices=("x",)))
    assert same == question_key(Question("a", "text", answer="2", choices=("x",)))
    changed = [Question("b", "text", choices=("x",)), Question("a", "texts", choices=("x",)), Question("a", "text")]
    assert len({same, *(question_key(question) for question in changed)}) == 4


def test_seeds_fit_into_32_bits_with_room_for_the_samples() -> None:
    seeds = [first_seed(0, f"q{i}") for i in range(1000)]
    assert len(set(seeds)) == 1000 and max(seeds) + 1000 < 2**31
    assert first_seed(1, "q0") != seeds[0]
