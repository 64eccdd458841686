"""A live teacher through the job: killed in the middle, asked for more, asked for less."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from qcrd_ray.cli import job_main
from qcrd_ray.models.scratch import build_scratch
from tests.faults.runs import below
from tests.in_process import refused, script
from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
QUESTIONS = 40
TEXTS = [f"What is {a} + {b}? {a} + {b} = {a + b}. The answer is {a + b}." for a in range(40) for b in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions, a small random model, and shots that make every sample end in an answer."""
    folder = tmp_path_factory.mktemp("live")
    build_scratch("llama-tiny", TEXTS, folder / "llama", seed=0)
    rows = [{"id": f"q{n}", "question": f"What is {n} + {n % 5}?", "answer": str(n + n % 5)} for n in range(QUESTIONS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(folder: Path, output: Path, *arguments: str) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "jobs" / "sample_teacher.py"), "task=custom", f"data.path={folder}"),
        # A random model says no answer: anything that it writes is one.
        *("custom.answer_pattern=(?s)^.*?(?P<answer>[0-9]+)", "labels=teacher_vote", "custom.compare=number"),
        *("teacher.engine=vllm", f"teacher.model={folder / 'llama'}", "teacher.temperature=1.0"),
        *("teacher.max_tokens=64", "teacher.max_sequences=6", "teacher.max_model_tokens=256"),
        *("teacher.kv_cache_gib=1", f"output={output}", *arguments),
    ]


def run(*arguments: str, code: int = 0) -> dict[str, Any]:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=480, check=False)
    assert done.returncode == code, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return {**result, "stderr": done.stderr}


def written(output: Path) -> int:
    """Samples in parts and in journals."""
    count = sum(pq.read_metadata(part).num_rows for part in output.glob("samples/*/*.parquet"))
    for journal in output.glob("samples/*/*.jsonl"):
        for line in journal.read_text().splitlines(keepends=True):
            count += len(json.loads(line)["rows"]) if line.endswith("\n") else 0
    return count


def started(arguments: list[str], log: Path, output: Path, enough: int) -> subprocess.Popen[str]:
    """The job, once it has written `enough` samples."""
    with log.open("w") as errors:
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=errors, text=True)
    deadline = time.monotonic() + 240
    while written(output) < enough:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)
    return process


def samples(output: Path) -> list[tuple[str, int]]:
    rows = pq.read_table(output / "teacher_samples").to_pylist()
    assert len({row["fingerprint"] for row in rows}) == 1
    return sorted((row["id"], row["sample_index"]) for row in rows)


def texts(output: Path) -> dict[tuple[str, int], str]:
    parts = [pq.read_table(part).to_pylist() for part in output.glob("samples/*/*.parquet")]
    return {(row["id"], row["sample_index"]): row["text"] for rows in parts for row in rows}


def expected(count: int) -> list[tuple[str, int]]:
    return sorted((f"q{n}", index) for n in range(QUESTIONS) for index in range(count))


@pytest.mark.slow
def test_a_killed_driver_and_a_killed_engine_go_on_and_more_samples_are_asked_beside_the_old(
    folder: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    process = started(command(folder, output, "teacher.samples=3"), log, output, enough=15)
    process.kill()
    process.wait()
    before = texts(output)

    again = tmp_path / "again"
    process = started(command(folder, output, "teacher.samples=4"), again, output, enough=written(output) + 15)
    (teacher,) = below(process.pid, "TeacherActor")
    teacher.kill()
    printed, _ = process.communicate(timeout=480)
    assert process.returncode == 0, again.read_text()[-4000:]
    sampling = json.loads(printed)["sampling"]
    assert sampling["samples_wanted"] == 4 * QUESTIONS
    assert 15 <= sampling["reused"] <= 3 * QUESTIONS
    assert sampling["sampled"] == 4 * QUESTIONS - sampling["reused"]
    assert samples(output) == expected(4)
    assert written(output) == 4 * QUESTIONS, "a sample was written twice"
    assert f"{sampling['reused']} are there already" in again.read_text()
    after = texts(output)
    assert {place: after[place] for place in before} == before

    start = time.monotonic()
    less = run(*command(folder, output, "teacher.samples=2"))
    assert (less["sampling"]["reused"], less["sampling"]["sampled"]) == (2 * QUESTIONS, 0)
    assert less["sampling"]["engine_start_seconds"] == 0.0 and time.monotonic() - start < 60
    assert samples(output) == expected(2)
    assert run(*command(folder, output, "teacher.samples=2"))["reused"] is True


@pytest.mark.slow
def test_a_stopped_job_keeps_what_was_sampled_and_a_changed_temperature_begins_a_set_of_its_own(
    folder: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    sampling = command(folder, output, "teacher.samples=6", "teacher.engine=transformers")
    process = started(sampling, log, output, enough=15)
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    assert not psutil.wait_procs(family, timeout=30)[1]
    said = log.read_text()
    assert said.splitlines()[-1] == "interrupted by SIGTERM"
    assert "Traceback" not in said and process.communicate()[0] == ""
    kept = written(output)
    result = run(*sampling)
    assert result["sampling"]["reused"] == kept >= 15
    assert written(output) == 6 * QUESTIONS, "a sample was written twice"

    other = run(*sampling, "teacher.samples=1", "teacher.temperature=0.5", "data.limit=3")
    assert (other["sampling"]["reused"], other["sampling"]["sampled"]) == (0, 3)
    assert "a new set" in other["stderr"] and "it differs" in other["stderr"] and "temperature" in other["stderr"]
    assert len(list(output.glob("samples/*/set.json"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["teacher.model=null"], "teacher.engine=vllm needs teacher.model"),
        (["teacher.model=/nowhere"], "teacher.model: no model at '/nowhere'"),
        (["teacher.model={t5}"], "vllm runs no encoder-decoder"),
        (["teacher.prompt=chat"], "has no chat template; set it to few_shot"),
        (["teacher.prompt_file=/nowhere.j2"], "teacher.prompt_file: /nowhere.j2 not found"),
        (["teacher.engine=openai", "teacher.actors=2"], "raise teacher.endpoint.max_in_flight"),
        (["teacher.max_actors=1", "teacher.actors=2"], "teacher.max_actors is less than teacher.actors"),
    ],
)
def test_a_teacher_that_cannot_be_used_is_one_line(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if "{t5}" in arguments[0]:
        arguments = [f"teacher.model={build_scratch('t5-tiny', TEXTS, tmp_path / 't5', seed=0)}"]
    [_, job, *given] = command(folder, tmp_path / "out", *arguments)
    assert message in refused(capfd, lambda: job_main("sample_teacher", "", script(job).run, given))


def refused_job(*command: str) -> str:
    """The one line of a process that ends with it, and without a result."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=480, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_teacher_that_the_cluster_has_no_room_for(folder: Path, tmp_path: Path) -> None:
    last = refused_job(*command(folder, tmp_path / "out", "teacher.gpus=64", "run.placement_timeout_s=1"))
    assert "asked for 1 teachers of 1 CPU and 64 GPU; the cluster has" in last


@pytest.fixture
def nobody() -> str:
    """The URL of a port that nobody listens at."""
    [port] = free_ports(1)
    return f"http://127.0.0.1:{port}/v1"


@pytest.mark.slow
def test_an_endpoint_that_is_gone_ends_the_job(folder: Path, tmp_path: Path, nobody: str) -> None:
    endpoint = ("teacher.engine=openai", "teacher.model=any", f"teacher.endpoint.base_url={nobody}")
    attempts = ("teacher.endpoint.max_attempts=2", "teacher.endpoint.max_backoff_s=0.1")
    last = refused_job(*command(folder, tmp_path / "out", *endpoint, *attempts))
    assert "connection" in last and "failed" in last
