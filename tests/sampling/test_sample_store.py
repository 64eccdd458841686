"""Nothing that was written is lost or doubled, whatever is killed when."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from qcrd_ray.errors import UserError
from qcrd_ray.rationales.schema import STORED_SAMPLES, check_table
from qcrd_ray.sampling.sample_store import Chunk, SampleSet, SetLock, Usage


def row(key: int, index: int, text: str = "text") -> dict[str, Any]:
    return {
        "key": key,
        "id": f"q{key}",
        "sample_index": index,
        "text": text,
        "seed": index,
        "finish_reason": "stop",
        "completion_tokens": 3,
    }


USAGE = Usage(requests=1, prompt_tokens=10, completion_tokens=6, cost=0.25)


def places(folder: Path) -> list[tuple[int, int]]:
    tables = [pq.read_table(part).to_pylist() for part in SampleSet(folder).parts()]
    return sorted((row["key"], row["sample_index"]) for rows in tables for row in rows)


def test_a_chunk_becomes_one_part_and_its_journal_goes(tmp_path: Path) -> None:
    chunk = Chunk(tmp_path, "run-000000")
    chunk.append([row(1, 0), row(1, 1)], USAGE)
    chunk.append([row(2, 0)], USAGE)
    chunk.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["run-000000.parquet"]
    check_table(pq.read_schema(tmp_path / "run-000000.parquet"), STORED_SAMPLES, "part")
    found = SampleSet(tmp_path)
    assert found.rows() == 3
    assert found.usage() == Usage(2, 20, 12, 0.5)
    index = found.index()
    assert (index.of(1), index.of(2), index.of(3)) == ({0, 1}, {0}, set())


def test_what_a_killed_run_wrote_is_recovered_without_its_last_torn_line(tmp_path: Path) -> None:
    chunk = Chunk(tmp_path, "run-000003")
    chunk.append([row(1, 0)], USAGE)
    chunk.append([row(2, 0)], USAGE)
    (journal,) = tmp_path.glob("*.jsonl")
    with journal.open("ab") as file:
        file.write(json.dumps({"rows": [row(3, 0)], "usage": USAGE.__dict__}).encode()[:-7])
    (tmp_path / ".run-000003-aa.tmp").write_bytes(b"half a part")
    assert SampleSet(tmp_path).recover() == 1
    assert places(tmp_path) == [(1, 0), (2, 0)]
    assert SampleSet(tmp_path).usage() == USAGE + USAGE
    assert [path.name for path in tmp_path.iterdir()] == ["run-000003.parquet"]


def test_a_second_attempt_at_a_chunk_sees_the_first_and_joins_it(tmp_path: Path) -> None:
    first = Chunk(tmp_path, "run-000000")
    first.append([row(1, 0), row(1, 1)], USAGE)  # and its process dies
    second = Chunk(tmp_path, "run-000000")
    assert second.done() == {(1, 0), (1, 1)}
    second.append([row(2, 0)], USAGE)
    second.finish()
    assert places(tmp_path) == [(1, 0), (1, 1), (2, 0)]
    third = Chunk(tmp_path, "run-000000")
    assert third.done() == {(1, 0), (1, 1), (2, 0)}
    third.append([row(3, 0)], USAGE)
    third.finish()
    assert places(tmp_path) == [(1, 0), (1, 1), (2, 0), (3, 0)]
    assert SampleSet(tmp_path).usage() == USAGE + USAGE + USAGE


def test_a_kill_between_the_part_and_the_removal_of_its_journal_counts_once(tmp_path: Path) -> None:
    chunk = Chunk(tmp_path, "run-000000")
    chunk.append([row(1, 0)], USAGE)
    (journal,) = tmp_path.glob("*.jsonl")
    kept = journal.read_bytes()
    chunk.finish()
    journal.write_bytes(kept)
    SampleSet(tmp_path).recover()
    assert places(tmp_path) == [(1, 0)]
    assert SampleSet(tmp_path).usage() == USAGE
    assert not list(tmp_path.glob("*.jsonl"))


def test_the_same_sample_twice_is_one_row(tmp_path: Path) -> None:
    for text in ("first", "second"):
        Chunk(tmp_path, "run-000000").append([row(1, 0, text)], USAGE)
    Chunk(tmp_path, "run-000000").finish()
    assert places(tmp_path) == [(1, 0)]


def test_a_part_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "run-000000.parquet").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"run-000000\.parquet: no valid Parquet .* remove it"):
        SampleSet(tmp_path).index()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_no_line_that_was_written(small_disk: Path) -> None:
    chunk = Chunk(small_disk, "run-000000")
    written: list[int] = []

    def fill(keys: range) -> None:
        for key in keys:
            chunk.append([row(key, 0, "x" * 1000)], USAGE)
            written.append(key)

    with pytest.raises(OSError, match="No space left|only a part"):
        fill(range(1000))
    assert 20 < len(written) < 70
    assert chunk.done() == {(key, 0) for key in written}
    with pytest.raises(OSError, match="No space left|only a part"):
        fill(range(2000, 3000))
    assert chunk.done() == {(key, 0) for key in written}


HOLD = """
import sys, time
from pathlib import Path
from qcrd_ray.sampling.sample_store import SetLock
lock = SetLock(Path(sys.argv[1]))
lock.share() if sys.argv[2] == "share" else lock.take(1)
print("held", flush=True)
time.sleep(60)
"""


def holder(folder: Path, how: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_two_runs_never_sample_into_one_set(tmp_path: Path) -> None:
    process = holder(tmp_path, "take")
    try:
        start = time.monotonic()
        with pytest.raises(UserError, match=f"process {process.pid}.*is sampling them"), SampleSet(tmp_path).locked(30):
            pass
        assert time.monotonic() - start < 5, "a run that is alive is not waited for"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with SampleSet(tmp_path).locked(5):
        pass


def test_a_run_waits_for_a_living_one_where_it_is_to(tmp_path: Path) -> None:
    process = holder(tmp_path, "take")
    end = threading.Timer(1.5, process.kill)
    end.start()
    try:
        with SampleSet(tmp_path).locked(patience_s=30.0):
            assert process.wait(timeout=0.1) == -signal.SIGKILL  # it had the lock until then
    finally:
        end.cancel()
        process.kill()
        process.wait()


def test_a_run_waits_for_the_actors_that_a_killed_one_left(tmp_path: Path) -> None:
    process = holder(tmp_path, "share")
    try:
        with pytest.raises(UserError, match="is sampling them"), SampleSet(tmp_path).locked(0.5):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with SampleSet(tmp_path).locked(5) as lock:
        lock.share()
        SetLock(tmp_path).share()
