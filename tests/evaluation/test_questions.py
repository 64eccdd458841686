"""Questions as they are read: from lines, files and pipes, good ones and bad ones."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qcrd_ray.errors import UserError
from qcrd_ray.evaluation import questions
from qcrd_ray.evaluation.questions import Asked, Bad, Format, Input, check_file, read_questions


def read(path: Path, form: Format = "auto", batch: int = 1000) -> list[Input]:
    return [one for inputs in read_questions(path, form, batch, 0.2) for one in inputs]


def of_bytes(folder: Path, content: bytes, form: Format = "auto") -> list[Input]:
    path = folder / "questions"
    path.write_bytes(content)
    return read(path, form)


def test_the_first_line_decides_what_all_lines_are(tmp_path: Path) -> None:
    assert of_bytes(tmp_path, b'\xef\xbb\xbf{"question": "a", "id": 7}\r\n\n  \n{"question": "b", "id": "x"}') == [
        Asked(1, "a", None, 7),
        Asked(4, "b", None, "x"),
    ]
    assert of_bytes(tmp_path, "\ufeff  What is {x}?\r\n\nWhat is y?\n".encode()) == [
        Asked(1, "What is {x}?"),
        Asked(3, "What is y?"),
    ]
    assert of_bytes(tmp_path, b"{x} is what?\n", "lines") == [Asked(1, "{x} is what?")]
    assert of_bytes(tmp_path, b"") == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "a"', "2: no valid JSON: Expecting ',' delimiter (column 17)"),
        (b"[1]", "2: expected a JSON object, found [1]"),
        (b'"text"', '2: expected a JSON object, found "text"'),
        (b'{"question": "a\0"}', "2: it holds NUL characters"),
        (b"{}", "2: no column 'question' (or premise and hypothesis); there are: none"),
        (b'{"Question": "a"}', "2: no column 'question' (or premise and hypothesis); there are: Question"),
        (b'{"question": "  "}', "2: column 'question' is empty"),
        (b'{"question": 3}', "2: column 'question': expected a string, found a number"),
        (b'{"question": null}', "2: column 'question' is empty"),
        (b'{"question": "a", "choices": "b"}', "2: column 'choices': expected a list of strings, found text"),
        (b'{"question": "a", "choices": ["b", 1]}', "2: column 'choices': expected a list of strings, found a list"),
        (json.dumps({"question": "a", "choices": ["b"] * 27}).encode(), "2: column 'choices': expected 26 at most"),
        (b'{"Body": " ", "Question": ""}', "2: columns 'Body' and 'Question' are empty"),
        (b'{"premise": null, "hypothesis": ""}', "2: columns 'premise' and 'hypothesis' are empty"),
        (b'{"\\ud83d": 1}', "2: no column 'question' (or premise and hypothesis); there are: \\ud83d"),
        (b'{"\\u001b[31m": 1}', "2: no column 'question' (or premise and hypothesis); there are: \\u001b[31m"),
        (b'{"question": "a", "id": 1.5}', "2: column 'id': expected a text or a whole number, found 1.5"),
        (b'{"question": "a", "id": true}', "2: column 'id': expected a text or a whole number, found true"),
        (b'{"question": "a \\ud800"}', "2: column 'question': half of a surrogate pair"),
        (b'{"question": "a", "id": "\\udc00"}', "2: column 'id': half of a surrogate pair"),
        (b'{"question": "\xff"}', "2: no valid UTF-8"),
        (b'{"question": ' + b"[" * 100_000, "2: no valid JSON that can be read"),
        (b'{"question": "a", "id": ' + b"9" * 10_000 + b"}", "2: no valid JSON that can be read"),
    ],
)
def test_a_bad_line_keeps_its_place_and_says_what_is_wrong(tmp_path: Path, line: bytes, message: str) -> None:
    first, bad, last = of_bytes(tmp_path, b'{"question": "a"}\n' + line + b'\n{"question": "c"}\n')
    assert (first, last) == (Asked(1, "a"), Asked(3, "c"))
    assert isinstance(bad, Bad)
    assert bad.number == 2
    assert bad.message.startswith(f"{tmp_path / 'questions'}:{message}")
    assert "\n" not in bad.message and len(bad.message) < 300


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "MOST_LINE_BYTES", 1 << 10)
    monkeypatch.setattr(questions, "READ_BYTES", 100)
    for length in (1 << 10, 1 << 14):
        first, long, last = of_bytes(tmp_path, b"first\n" + b"x" * length + b"\nlast")
        assert (first, last) == (Asked(1, "first"), Asked(3, "last"))
        assert isinstance(long, Asked) == (length <= 1 << 10)
    assert isinstance(of_bytes(tmp_path, b"x" * (1 << 14))[0], Bad)


def test_columns_are_those_that_training_reads(tmp_path: Path) -> None:
    rows = [
        {"premise": "It rains.", "hypothesis": "It is wet."},
        {"question": "Which?", "choices": {"label": ["A", "B"], "text": ["red", "blue"]}},
        {"Body": "Nora has 3 plums.", "Question": "How many?"},
    ]
    found = of_bytes(tmp_path, "\n".join(map(json.dumps, rows)).encode())
    assert found == [
        Asked(1, "premise: It rains.\nhypothesis: It is wet."),
        Asked(2, "Which?", ("red", "blue")),
        Asked(3, "Nora has 3 plums.\nHow many?"),
    ]


def test_tables(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,question,choices\nx,"a, or\nb","[""r"", ""s""]"\ny,c,\nz,,\n', encoding="utf-8")
    first, second, bad = read(tmp_path / "a.csv")
    assert (first, second) == (Asked(2, "a, or\nb", ("r", "s"), "x"), Asked(4, "c", None, "y"))
    assert isinstance(bad, Bad) and ":5: column 'question' is empty" in bad.message
    table = pa.table({"id": [1, 2, 3], "question": ["a", "b", None], "choices": [["r", "s"], None, None]})
    pq.write_table(table, tmp_path / "b.parquet")
    first, second, bad = read(tmp_path / "b.parquet")
    assert (first, second) == (Asked(1, "a", ("r", "s"), 1), Asked(2, "b", None, 2))
    assert isinstance(bad, Bad) and "row 3: column 'question' is empty" in bad.message
    with pytest.raises(UserError, match="--format is for lines"):
        read(tmp_path / "b.parquet", "jsonl")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="no valid Parquet"):
        read(tmp_path / "c.parquet")
    with pytest.raises(UserError, match="nowhere: not found"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read(tmp_path)


def test_a_row_of_another_width_than_the_header_is_a_bad_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,id\nfine,1\nTom, who has 3, eats 1,2\nalso fine,3\n")
    first, bad, last = read(tmp_path / "a.csv")
    assert (first, last) == (Asked(2, "fine", None, "1"), Asked(4, "also fine", None, "3"))
    assert isinstance(bad, Bad) and bad.message.endswith("a.csv:3: 4 cells, but the header has 2")


def test_the_ending_of_a_table_may_be_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "a.CSV").write_text("id,question\nx,a\n", encoding="utf-8")
    [found] = read(tmp_path / "a.CSV")
    assert isinstance(found, Asked) and found.question == "a"


@pytest.mark.parametrize(("name", "content", "message"), [
    ("q.tsv", "id\tquestion\nx\ta\n", "q.tsv: .tsv is not read; expected .csv, .parquet, .jsonl or a question a line"),
    ("q.json", '[{"question": "a"},\n{"question": "b"}]\n', "q.json:1: a JSON array; expected a JSON object a line"),
    ("q.json", '[\n  {"question": "a"}\n]\n', "q.json:1: a JSON array"),
])  # fmt: skip
def test_what_no_question_looks_like_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(message)):
        read(tmp_path / name)
    assert len(read(tmp_path / name, "lines")) == content.count("\n")


def test_a_question_may_begin_with_a_bracket(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("[3, 4]: which is larger?\n", encoding="utf-8")
    [found] = read(tmp_path / "q.txt")
    assert isinstance(found, Asked) and found.question == "[3, 4]: which is larger?"


def test_a_file_is_cut_into_whole_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "READ_BYTES", 64)
    (tmp_path / "lines").write_text("".join(f"question {number}\n" for number in range(1, 26)))
    batches = list(read_questions(tmp_path / "lines", "auto", 10, 0.0))
    assert [len(batch) for batch in batches] == [10, 10, 5]
    assert [one.number for batch in batches for one in batch] == list(range(1, 26))


def test_a_pipe_is_answered_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    source, sink = os.pipe()
    monkeypatch.setattr(questions, "STANDARD_INPUT", source)

    def write() -> None:
        os.write(sink, b"a\nb\nc")
        time.sleep(1.0)
        os.write(sink, b"d\n")
        os.write(sink, b"e\n" * 5)
        os.close(sink)

    writer = threading.Thread(target=write)
    writer.start()
    batches: Iterator[list[Input]] = read_questions(None, "auto", 4, 0.3)
    assert next(batches) == [Asked(1, "a"), Asked(2, "b")]
    assert writer.is_alive()
    rest = list(batches)
    writer.join()
    os.close(source)
    assert [one.question for batch in rest for one in batch if isinstance(one, Asked)] == ["cd", *"eeeee"]
    assert all(len(batch) <= 4 for batch in rest)


def test_a_pipe_that_never_pauses_is_answered_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    source, sink = os.pipe()
    monkeypatch.setattr(questions, "STANDARD_INPUT", source)
    lines, pause = 40, 0.05

    def write() -> None:
        for number in range(lines):
            os.write(sink, f"{number}\n".encode())
            time.sleep(pause)
        os.close(sink)

    writer = threading.Thread(target=write)
    writer.start()
    # Each line comes sooner after the one before than a batch waits for more.
    batches = list(read_questions(None, "auto", 1024, 4 * pause))
    writer.join()
    os.close(source)
    assert [one.number for batch in batches for one in batch] == list(range(1, lines + 1))
    assert len(batches) >= 3


def test_a_file_may_be_a_named_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("a\nb\n"))
    writer.start()
    check_file(tmp_path / "pipe")
    assert [one.question for one in read(tmp_path / "pipe") if isinstance(one, Asked)] == ["a", "b"]
    writer.join()
