"""A student is asked for rationales, and for labels, as it was trained, whatever the config of the job says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qcrd_ray.errors import UserError
from qcrd_ray.evaluation.accuracy import evaluate
from qcrd_ray.evaluation.student_rationales import choose_rows, explaining_student, sample_student
from qcrd_ray.models.exported import STUDENT_FILE, ExportedStudent
from tests.taught import ANSWERS, student_config, teach


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that writes rationale and label in one text."""
    run = teach(student_config("llama-tiny", "single_task"), tmp_path_factory.mktemp("taught"))
    return run.get_folder("student")


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """Of a job whose config is another student's: two tasks, labels of two tokens."""
    lines = [
        json.dumps({"id": question, "question": question, "answer": label}) + "\n"
        for question, (label, _) in ANSWERS.items()
    ]
    (tmp_path / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    return [f"data.path={tmp_path}", "evaluation.split=test", "evaluation.max_new_tokens=2", "sampler.precision=fp32"]


def test_rationales_and_labels_are_asked_for_as_the_student_was_trained(student: Path, settings: list[str]) -> None:
    config = student_config("llama-tiny", "qcrd", *settings)
    questions = [row.question for row in choose_rows(config, "test", None, 0)]
    [found] = sample_student(config, str(student), questions, (0.0,), labels=True)
    written = {question.question: (one.label, one.rationale) for question, [one] in zip(questions, found, strict=True)}
    assert written == ANSWERS
    assert evaluate(student_config("llama-tiny", "qcrd", *settings, f"student.model={student}"))["accuracy"] == 1.0


def test_a_folder_that_says_nothing_is_asked_by_the_config(student: Path, settings: list[str]) -> None:
    file = student / STUDENT_FILE
    text = file.read_text(encoding="utf-8")
    file.unlink()
    try:
        two_tasks = student_config("llama-tiny", "qcrd", *settings, f"student.model={student}")
        assert evaluate(two_tasks)["accuracy"] == 0.0
        one = student_config("llama-tiny", "single_task", *settings, f"student.model={student}")
        longer = one.evaluation.model_copy(update={"max_new_tokens": 8})
        assert evaluate(one.model_copy(update={"evaluation": longer}))["accuracy"] == 1.0
    finally:
        file.write_text(text, encoding="utf-8")


def test_a_student_of_labels_alone_explains_nothing(student: Path) -> None:
    config = student_config("llama-tiny", "qcrd")
    assert explaining_student(config, "student.model", str(student)) == str(student)
    file = student / STUDENT_FILE
    text = file.read_text(encoding="utf-8")
    file.write_text(ExportedStudent.of(student_config("llama-tiny", "finetune")).text(), encoding="utf-8")
    try:
        with pytest.raises(UserError, match=r"config key comparison\.student_a: .* was trained by finetune"):
            explaining_student(config, "comparison.student_a", str(student))
    finally:
        file.write_text(text, encoding="utf-8")
