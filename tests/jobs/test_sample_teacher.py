"""The job as a user starts it: a process, its one line of error, its last line of output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GOOD = {"id": "a", "question": "q", "answer": "1", "teacher_samples": [{"rationale": "r", "answer": "1"}]}


@pytest.fixture
def job(ray_session: Any) -> Any:
    """Runs the job on the Ray of this session, which saves the start of another."""
    environment = {**os.environ, "RAY_ADDRESS": ray_session.get_runtime_context().gcs_address}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "jobs" / "sample_teacher.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)

    return run


def lines(folder: Path, *rows: Any) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text)
    return folder


def test_result_is_the_last_line_of_standard_output(job: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = job("task=svamp", f"data.path={lines(tmp_path, GOOD)}", f"output={output}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["job"], result["train"]["used"], result["simulated"]) == ("sample_teacher", 1, False)
    assert json.loads((output / "result.json").read_text()) == result
    again = json.loads(job("task=svamp", f"data.path={tmp_path}", f"output={output}").stdout)
    assert again["reused"] is True


@pytest.mark.parametrize(
    ("rows", "arguments", "expected"),
    [
        ([GOOD, '{"id": '], [], "train.jsonl:2: no valid JSON"),
        ([{**GOOD, "question": 3}], [], "train.jsonl:1: column 'question': expected a string, found a number"),
        ([{"id": "a", "prompt": "q", "answer": "1"}], [], "no column 'question'"),
        ([GOOD, GOOD], [], "train.jsonl:2: id 'a' stands twice, first at line 1"),
        ([], [], "is empty"),
        ([GOOD], ["data.teachers=[gpt]"], "no samples of 'gpt'; known: unnamed"),
        ([{**GOOD, "answer": "2"}], ["positives=gold"], "no question of the split 'train'"),
        (
            [{**GOOD, "teacher_samples": [{"rationale": "x" * 100_000, "answer": "1"}]}],
            [],
            "no_samples 1 (a); samples left out: 1 too long",
        ),
        ([GOOD], ["data.pth=x"], "data.path"),
        ([GOOD], ["teacher.samples=many"], "teacher.samples"),
        ([GOOD], ["--samples=3"], "--samples=3"),
        ([GOOD], ["data.path=/nowhere/at/all"], "/nowhere/at/all not found"),
        ([GOOD], ["output=null"], "output: not set"),
        ([GOOD], ["--config=nowhere.yaml"], "nowhere.yaml: not found"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    job: Any, tmp_path: Path, rows: list[Any], arguments: list[str], expected: str
) -> None:
    output = tmp_path / "deep" / "out"
    done = job("task=svamp", f"data.path={lines(tmp_path, *rows)}", f"output={output}", *arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1
    assert expected in errors[0]
    assert done.stderr.splitlines()[-1] == errors[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not output.parent.exists()


def test_help_names_every_key_in_two_seconds() -> None:
    begin = os.times()
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "sample_teacher.py"), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    end = os.times()  # of a processor: whatever else runs here
    assert end.children_user + end.children_system - begin.children_user - begin.children_system < 2.0
    for key in ("data.max_rationale_chars", "teacher.samples", "negatives.top_k", "run.resume"):
        assert key in done.stdout


def test_show_config_prints_what_would_run() -> None:
    import yaml

    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "sample_teacher.py"), "task=cqa", "--show-config", "optim.lr=1e-4"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    shown = yaml.safe_load(done.stdout)
    assert (shown["task"], shown["optim"]["lr"], shown["teacher"]["samples"]) == ("cqa", 1e-4, 5)
