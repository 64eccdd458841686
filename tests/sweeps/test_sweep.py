"""Whole sweeps as a user starts them, with real Ray Tune, Ray Train, DeepSpeed, a live teacher and engines."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from qcrd_ray.models.scratch import build_scratch
from tests.faults.runs import ROOT, TINY, Job
from tests.in_process import refused, script


def sweep_of(log: Path, *arguments: str) -> Job:
    """A sweep that is started as a user starts it."""
    return Job([sys.executable, str(ROOT / "tune" / "sweep.py"), "--config", str(TINY), *arguments], log)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions without samples, and a small random model as their teacher."""
    folder = tmp_path_factory.mktemp("questions")
    texts = [f"What is {a} + {b}? {a} + {b} = {a + b}. The answer is {a + b}." for a in range(40) for b in range(5)]
    build_scratch("llama-tiny", texts, folder / "llama", seed=0)
    for split, count in (("train", 24), ("valid", 8), ("test", 8)):
        rows = [{"id": f"{split}{n}", "question": f"What is {n} + 3?", "answer": str(n + 3)} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_that_is_killed_goes_on_and_nothing_is_done_twice(questions: Path, tmp_path: Path) -> None:
    steps = 40  # so many that the second trial is far from its end when the driver is killed
    arguments = (
        *("--space", "negatives.count=[1, 2]", "teacher.samples=2"),
        *("name=grid", f"run.storage_path={tmp_path}", f"train.max_steps={steps}", "train.checkpoint_interval=2"),
        "max_concurrent_trials=1",  # on any number of CPUs the second trial begins when the first has ended
        *("task=custom", "custom.answer_pattern=(?s)^.*?(?P<answer>[0-9]+)", "custom.compare=number"),
        *(f"data.path={questions}", "evaluation.examples=0", "judge.pretrain_steps=3"),
        *("teacher.engine=transformers", f"teacher.model={questions / 'llama'}", "teacher.max_tokens=24"),
        *("teacher.max_model_tokens=256", "teacher.temperature=1.0", "teacher.cpus=0.5"),
    )
    folder = tmp_path / "grid"
    with sweep_of(tmp_path / "first.log", *arguments) as sweep:
        sweep.until(lambda: len(list(folder.glob("trials/*/result.json"))) == 1)
        sweep.until(lambda: len(list(folder.glob("trials/count-2*/checkpoints/0*/manifest.json"))) > 0)
        sweep.kill_driver()
    done = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")}
    assert len(done) == 1
    samples = {path: path.read_bytes() for path in folder.glob("samples/*/*.parquet")}
    assert sum(pq.read_metadata(path).num_rows for path in samples) == 2 * 24

    with sweep_of(tmp_path / "second.log", *arguments) as again:
        result = again.wait()
    assert {path: path.stat().st_mtime_ns for path in done} == done
    started = re.findall(r"(\S+): started", again.said)
    assert len(started) == 1 and started[0].startswith("count-2")

    # The teacher was asked for two samples a question, once; one discriminator was pretrained.
    assert {path: path.read_bytes() for path in folder.glob("samples/*/*.parquet")} == samples
    assert result["reused"]["teacher_samples_asked"] == 0
    assert result["reused"]["teacher_samples_reused"] == 48
    assert (result["reused"]["judges_pretrained"], result["reused"]["judges_reused"]) == (1, 1)
    assert result["trials"] == {"total": 2, "finished": 2, "stopped": 0, "failed": 0, "missing": 0}
    [second] = folder.glob("trials/count-2*/result.json")
    assert 2 <= json.loads(second.read_text())["resumed_from_step"] < steps

    assert [point["labels"] for point in result["points"]] == [{"count": "1"}, {"count": "2"}]
    trials, points = pq.read_table(folder / "trials.parquet"), pq.read_table(folder / "points.parquet")
    assert (trials.num_rows, points.num_rows) == (2, 2)
    assert pyarrow.csv.read_csv(folder / "trials.csv").num_rows == 2
    assert set(trials["status"].to_pylist()) == {"finished"}
    assert json.loads((folder / "result.json").read_text()) == result
    [figure] = folder.glob("figures/*")
    assert figure.name == "accuracy-over-count.svg"
    assert "count-2" in (folder / "report.html").read_text()
    # What only a training that goes on would need is not kept.
    assert len(list(folder.glob("trials/*/student/model.safetensors"))) == 2
    assert not [*folder.glob("trials/*/checkpoints"), *folder.glob("trials/*/snapshots")]

    # What is complete is not run again; another config is no part of it.
    with sweep_of(tmp_path / "third.log", *arguments) as third:
        assert third.wait()["trials"]["finished"] == 2
    assert "started" not in third.said
    with sweep_of(tmp_path / "fourth.log", *arguments, "loss.beta=0.4") as other:
        other.wait(code=2)
    assert "has another config: loss.beta (0.2 there, 0.4 here)" in other.said.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_stop_leaves_checkpoints_a_trial_that_dies_goes_on_and_one_that_fails_is_a_row_with_its_reason(
    tmp_path: Path,
) -> None:
    arguments = (
        # The second one's engine can never be as near to the trainer as it is asked to be.
        *("--space", "sampler.verify_tolerance=[1.0, 1.0e-12]", "name=f", f"run.storage_path={tmp_path}"),
        *("train.max_steps=40", "train.checkpoint_interval=30", "evaluation.examples=0", "judge.enabled=false"),
        "keep_checkpoints=true",
    )
    folder = tmp_path / "f"
    with sweep_of(tmp_path / "stopped.log", *arguments) as sweep:
        sweep.until(lambda: "started" in sweep.said and len(list(folder.glob("trials/*1.0_*/metrics.jsonl"))) == 1)
        [metrics] = folder.glob("trials/*-1.0_*/metrics.jsonl")
        sweep.until(lambda: metrics.read_text().count("\n") > 5)
        os.kill(sweep.process.pid, signal.SIGTERM)
        sweep.wait(code=143)
    assert sweep.said.strip().endswith("stopped at trial 0 of 2; the same command goes on from there")
    assert "Traceback" not in sweep.said
    [checkpoint] = folder.glob("trials/*-1.0_*/checkpoints/0*")
    step = int(checkpoint.name)
    assert 5 <= step < 30
    assert not (folder / "result.json").exists()

    with sweep_of(tmp_path / "again.log", *arguments) as again:
        again.until(lambda: metrics.read_text().count("\n") > step + 5)  # a trial goes on, and its driver dies
        os.kill(json.loads((metrics.parent / "owner.json").read_text())["process"], signal.SIGKILL)
        result = again.wait()
    assert "started, try 2" in again.said
    assert result["trials"] == {"total": 2, "finished": 1, "stopped": 0, "failed": 1, "missing": 0}
    [failure] = result["failures"]
    assert "1e-12" in failure["trial"] and "sampler.verify_tolerance" in failure["reason"]
    rows = {row["trial"]: row for row in pq.read_table(folder / "trials.parquet").to_pylist()}
    assert rows[failure["trial"]]["reason"] == failure["reason"]
    [finished] = folder.glob("trials/*/result.json")
    assert list(finished.parent.glob("checkpoints/*/manifest.json"))
    assert list(finished.parent.glob("snapshots/*/manifest.json"))
    assert json.loads(finished.read_text())["resumed_from_step"] in (step, 30)


@pytest.fixture(scope="module")
def sweep_script() -> Iterator[ModuleType]:
    """tune/sweep.py, which finds its neighbours as a script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tune")
        yield script("tune/sweep.py")
        sys.modules.pop("search_spaces")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "error: no space to sweep"),
        (("--space", "negative_k"), "did you mean negatives_k?"),
        (("--space", "negatives_k", "seeds=0"), "error: sweep key seeds: Input should be greater than or equal to 1"),
        (("--space", "negatives_k", "seed=2"), "error: config key seed: unknown"),
        (("--space", "negatives_k", "scheduler=asha"), "set train.eval_interval"),
        (("--space", "optim.lr={uniform: [0.1, 0.2]}"), "a range has no grid"),
        (("--space", "student.model=[scratch:t5-tiny, scratch:t5-none]"), "point model=scratch:t5-none: config key"),
        (("--space", "negatives_k", "run.resume=must"), "there is no sweep at"),
        (("--space", "negatives_k", "name=../x"), "is no folder name"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    sweep_script: ModuleType,
    arguments: tuple[str, ...],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = ["--config", str(TINY), f"run.storage_path={tmp_path / 'runs'}", *arguments]
    monkeypatch.setattr(sys, "argv", ["tune/sweep.py", *given])
    assert line in refused(capfd, lambda: sweep_script.run_job(sweep_script.prepare))
    assert not (tmp_path / "runs").exists()


def test_bad_input_ends_the_process_with_code_2(tmp_path: Path) -> None:
    with sweep_of(tmp_path / "log", f"run.storage_path={tmp_path / 'runs'}", "--space", "negative_k") as sweep:
        sweep.wait(code=2)
    last = sweep.said.strip().splitlines()[-1]
    assert "did you mean negatives_k?" in last and last.startswith("error: ")
    assert "Traceback" not in sweep.said
    assert not (tmp_path / "runs").exists()
