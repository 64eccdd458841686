from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qcrd_ray.config import ExperimentConfig, config_from_dict
from qcrd_ray.errors import UserError
from qcrd_ray.rationales.schema import Question
from qcrd_ray.rationales.sources import SourceRow, read_rows, source_fingerprint, splits_available
from qcrd_ray.tasks import get_task


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def question(number: int, **more: Any) -> dict[str, Any]:
    samples = [
        {"teacher": "t1", "rationale": f"it is {i} for {number}", "answer": str(i % 2 + number)} for i in range(4)
    ]
    text = {"id": f"q{number}", "question": f"How many is {number}?", "answer": str(number)}
    return {**text, "equation": f"( {number}.0 + 0.0 )", "teacher_samples": samples, **more}


def config(folder: Path | str, task: str = "svamp", **data: Any) -> ExperimentConfig:
    return config_from_dict({"task": task, "data": {"path": str(folder), **data}})


def rows(chosen: ExperimentConfig, split: str = "train", samples: bool = True) -> list[SourceRow]:
    return list(read_rows(chosen, get_task(chosen), split, samples))


def error(chosen: ExperimentConfig, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        rows(chosen, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_jsonl_nested_samples_and_the_equation_of_svamp(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [question(1), question(2)])
    write_lines(tmp_path / "valid.jsonl", [question(3)])
    read = rows(config(tmp_path))
    assert [row.question.id for row in read] == ["q1", "q2"]
    assert read[0].question.target == "( 1.0 + 0.0 )"
    assert len(read[0].samples) == 4
    assert splits_available(config(tmp_path)) == ("train", "valid")


def test_a_sorted_file_and_a_shuffled_one_give_the_same(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    first = question(1)
    shuffled = {**first, "teacher_samples": random.Random(3).sample(first["teacher_samples"], 4)}
    write_lines(one / "train.jsonl", [first])
    write_lines(two / "train.jsonl", [shuffled])
    assert rows(config(one)) == rows(config(two))


def test_parquet_and_flat_samples_equal_nested_jsonl(tmp_path: Path) -> None:
    nested, flat, parquet = tmp_path / "nested", tmp_path / "flat", tmp_path / "parquet"
    for folder in (nested, flat, parquet):
        folder.mkdir()
    questions = [question(i) for i in range(5)]
    samples = [{"id": q["id"], **s} for q in questions for s in q["teacher_samples"]]
    random.Random(0).shuffle(samples)
    bare = [{name: value for name, value in q.items() if name != "teacher_samples"} for q in questions]
    write_lines(nested / "train.jsonl", questions)
    write_lines(flat / "train.jsonl", bare)
    write_lines(flat / "train.teacher_samples.jsonl", samples)
    pq.write_table(pa.Table.from_pylist(bare), parquet / "train.parquet")
    pq.write_table(pa.Table.from_pylist(samples), parquet / "train.teacher_samples.parquet")
    assert rows(config(nested)) == rows(config(flat)) == rows(config(parquet))
    pq.write_table(pa.Table.from_pylist(questions), nested / "valid.parquet")
    assert rows(config(nested), "valid") == rows(config(nested))


def test_flat_samples_of_no_question_are_counted(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [question(1), question(2)])
    write_lines(
        tmp_path / "train.teacher_samples.jsonl",
        [{"id": i, "rationale": "one", "answer": "1"} for i in ("q1", "q2", "q7", "q7")],
    )
    assert [row.orphans for row in rows(config(tmp_path))] == [0, 2]


def test_column_map(tmp_path: Path) -> None:
    row = {"key": 7, "prompt": "How many?", "gold": 4, "texts": [{"by": "x", "why": "two and two", "answer": 4}]}
    write_lines(tmp_path / "train.jsonl", [row])
    columns = {
        "id": "key",
        "question": "prompt",
        "answer": "gold",
        "teacher_samples": "texts",
        "sample_teacher": "by",
        "sample_rationale": "why",
    }
    (read,) = rows(config(tmp_path, columns=columns))
    assert (read.question.id, read.question.question, read.question.answer) == ("7", "How many?", "4")
    assert (read.samples[0].teacher, read.samples[0].rationale, read.samples[0].answer) == ("x", "two and two", "4")
    message = error(config(tmp_path, columns={"qestion": "prompt"}))
    assert "data.columns.qestion" in message
    assert "question" in message


def test_a_sample_without_answer_column_is_parsed(tmp_path: Path) -> None:
    raw = [{"rationale": "There are 2 and 2. 2 + 2 = 4. The answer is (2 + 2).\n\nQ: And 3?\nA: The answer is (3)."}]
    write_lines(tmp_path / "train.jsonl", [question(4, teacher_samples=raw)])
    (read,) = rows(config(tmp_path))
    chosen = config(tmp_path)
    (one,) = read.samples
    assert one.answer is not None
    assert get_task(chosen).same_answer(one.answer, "4", None)
    assert "And 3" not in one.rationale


def test_long_and_empty_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    samples = [{"rationale": text, "answer": "1"} for text in ("x" * 100_000, "  ", "fine")]
    write_lines(tmp_path / "train.jsonl", [question(1, teacher_samples=samples)])
    (read,) = rows(config(tmp_path))
    assert (len(read.samples), read.too_long, read.empty) == (1, 1, 1)


def test_teachers_are_chosen_and_unknown_ones_named(tmp_path: Path) -> None:
    samples = [{"teacher": name, "rationale": f"by {name}", "answer": "1"} for name in ("t1", "t2")]
    write_lines(tmp_path / "train.jsonl", [question(1, teacher_samples=samples)])
    (read,) = rows(config(tmp_path, teachers=["t2"]))
    assert [s.teacher for s in read.samples] == ["t2"]
    message = error(config(tmp_path, teachers=["t3"]))
    assert "'t3'" in message
    assert "t1, t2" in message


def test_an_option_s_letter_becomes_its_text(tmp_path: Path) -> None:
    choices = {"label": ["A", "B"], "text": ["bank", "shore"]}
    write_lines(tmp_path / "train.jsonl", [{"id": "a", "question": "Where?", "choices": choices, "answer": "B"}])
    (read,) = rows(config(tmp_path, task="cqa"))
    assert (read.question.choices, read.question.answer) == (("bank", "shore"), "shore")


def test_nli_columns_and_label_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "anli1"
    (folder / "llm").mkdir(parents=True)
    write_lines(
        folder / "anli1_train.json",
        [{"uid": "u1", "premise": "It rains.", "hypothesis": "It is wet.", "label": 0, "reason": ""}],
    )
    (folder / "llm" / "train_CoT_0.json").write_text(json.dumps(["Rain is wet. So the answer is entailment."]))
    (read,) = rows(config(folder, task="anli1"))
    assert read.question.question == "premise: It rains.\nhypothesis: It is wet."
    assert (read.question.id, read.question.answer) == ("u1", "entailment")
    assert len(read.samples) == 1


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['{"id": "a", "question": "q", "answer": "1"}', '{"id": "b", '], ["train.jsonl:2", "no valid JSON"]),
        (["[1]"], ["train.jsonl:1", "JSON object"]),
        (['{"id": "a", "prompt": "q", "answer": "1"}'], ["'question'", "id, prompt, answer", "data.columns"]),
        (['{"question": "q", "answer": "1"}'], ["'id'", "question, answer"]),
        (['{"id": "a", "question": "q"}'], ["'answer'", "id, question"]),
        (['{"id": "a", "question": ["q"], "answer": "1"}'], ["train.jsonl:1", "'question'", "string", "list"]),
        (['{"id": "a", "question": "q", "answer": true}'], ["'answer'", "string"]),
        (['{"id": "a", "question": "q", "answer": "1", "choices": "x"}'], ["'choices'", "list of strings"]),
        (['{"id": "a", "question": "q", "answer": "1", "teacher_samples": {}}'], ["'teacher_samples'", "list"]),
        (
            ['{"id": "a", "question": "q", "answer": "1", "teacher_samples": [{"text": "x"}]}'],
            ["teacher_samples[0]", "'rationale'", "text"],
        ),
        (['{"id": "a", "question": "\\ud800", "answer": "1"}'], ["train.jsonl:1", "Unicode"]),
        (
            ['{"id": "a", "question": "q", "answer": "1"}', "", '{"id": "a", "question": "r", "answer": "1"}'],
            ["train.jsonl:3", "'a'", "line 1"],
        ),
        ([], ["empty", "train.jsonl"]),
    ],
)
def test_bad_lines_name_place_and_fault(tmp_path: Path, lines: list[str], expected: list[str]) -> None:
    (tmp_path / "train.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    message = error(config(tmp_path))
    assert all(part in message for part in expected), message


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(b'{"id": "\xff"}\n')
    assert "train.jsonl:1: no valid UTF-8" in error(config(tmp_path))
    (tmp_path / "valid.parquet").write_bytes(b"nothing of the kind")
    assert "no valid Parquet" in error(config(tmp_path), "valid")


def test_missing_files_name_the_nearest(tmp_path: Path) -> None:
    write_lines(tmp_path / "trian.jsonl", [question(1)])
    assert "did you mean trian.jsonl?" in error(config(tmp_path))
    assert f"did you mean {tmp_path}?" in error(config(f"{tmp_path}x"))
    assert "is a file" in error(config(tmp_path / "trian.jsonl"))
    (tmp_path / "train.jsonl").touch(), (tmp_path / "train.parquet").touch()
    assert "both train.jsonl and train.parquet" in error(config(tmp_path))


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [question(1)])
    before = source_fingerprint(config(tmp_path))
    write_lines(tmp_path / "train.jsonl", [question(1)])
    assert source_fingerprint(config(tmp_path)) == before
    write_lines(tmp_path / "train.jsonl", [question(2)])
    assert source_fingerprint(config(tmp_path)) != before


def test_hub_reads_what_datasets_reads(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="datasets (the extra hub) is not installed")
    write_lines(tmp_path / "train.jsonl", [question(1), question(2)])
    write_lines(tmp_path / "validation.jsonl", [question(3)])
    chosen = config(f"hub:{tmp_path}")
    assert splits_available(chosen) == ("train", "valid")
    assert [row.question.id for row in rows(chosen, "valid")] == ["q3"]
    assert len(rows(chosen)[0].samples) == 4


def test_distilling_step_by_step_layout(benchmark_data: Path) -> None:
    read = rows(config(benchmark_data / "dss" / "svamp"))
    assert len(read) == 800
    assert all(len(row.samples) + row.empty == 1 for row in read)
    assert read[0].question.target == "( 84.0 / 2.0 )"


def test_a_csv_is_read_as_people_write_it(tmp_path: Path) -> None:
    text = '\ufeffid,question,gold,choices\r\na,"one,\ntwo ""three""",1,"[""x"", ""y""]"\r\n\r\nb,four,,\r\n'
    (tmp_path / "train.csv").write_bytes(text.encode())
    found = [row.question for row in rows(config(tmp_path, "cqa", columns={"answer": "gold"}), samples=False)]
    assert found == [Question("a", 'one,\ntwo "three"', "1", None, ("x", "y")), Question("b", "four")]


def test_questions_without_gold_need_no_column_for_it(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("id,question\na,one\n")
    voted = config(tmp_path).model_copy(update={"labels": "teacher_vote"})
    assert [row.question for row in rows(voted, samples=False)] == [Question("a", "one")]
    assert "labels=teacher_vote" in error(config(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,question,answer\na,one\n", "train.csv:2: 2 cells, but the header has 3"),
        ('id,question,answer\na,"one,1\n', "train.csv:2: no valid CSV"),
        ("id,question,answer\n", "is empty"),
        ("id,question,answer\na,one,1\nb,two,2\na,three,3\n", "train.csv:4: id 'a' stands twice, first at line 2"),
    ],
)
def test_a_csv_that_cannot_be_read_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.csv").write_text(text)
    assert message in error(config(tmp_path))
