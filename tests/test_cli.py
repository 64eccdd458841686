from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qcrd_ray.cli import find_user_error, result_line
from qcrd_ray.errors import UserError
from qcrd_ray.run_folder import write_text_atomic


def test_result_line_is_one_line_of_strict_json() -> None:
    line = result_line({"a": float("nan"), "b": [np.float32(0.5), float("inf")], "c": Path("x"), "d": "one\ntwo"})
    assert "\n" not in line
    assert json.loads(line) == {"a": None, "b": [0.5, None], "c": "x", "d": "one\ntwo"}
    with pytest.raises(TypeError, match="object"):
        result_line({"a": object()})


def test_write_text_atomic_replaces_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text_atomic(path, "one")
    write_text_atomic(path, "two")
    assert path.read_text() == "two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(path, "\ud800")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "two"


def test_user_error_is_found_in_what_wraps_it() -> None:
    def wrapped() -> BaseException:
        try:
            try:
                raise UserError("inner")
            except UserError as error:
                raise RuntimeError("outer") from error
        except RuntimeError as error:
            return error

    found = find_user_error(wrapped())
    assert found is not None
    assert str(found) == "inner"
    assert find_user_error(RuntimeError("other")) is None


def test_the_error_is_the_last_line_whatever_was_printed_before() -> None:
    """As Ray prints what a raylet says: to standard output, which is buffered where it is no terminal."""
    program = """
import sys
from qcrd_ray.cli import run_job
from qcrd_ray.errors import UserError

def job():
    print("(raylet) a task is tried again")
    raise UserError("no such teacher")

sys.exit(run_job(lambda: job))
"""
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=buffered)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["(raylet) a task is tried again", "error: no such teacher"]
