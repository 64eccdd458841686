"""Whole runs as a user starts them, on a small scratch student, with real Ray, DeepSpeed and engines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from qcrd_ray.cli import job_main
from qcrd_ray.config import load_config
from qcrd_ray.rationales.order import DataOrder
from qcrd_ray.rationales.tables import open_rationale_table
from tests.in_process import refused, script

ROOT = Path(__file__).parents[2]
TINY = ROOT / "jobs" / "configs" / "tiny.yaml"
TIMEOUT = 480


def start(job: str, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
        start_new_session=True, cwd=cwd,
    )  # fmt: skip


def run(job: str, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    process = start(job, *arguments, cwd=cwd, **environment)
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def tiny(folder: Path, *arguments: str, cwd: Path | None = None) -> tuple[dict[str, Any], Path]:
    done = run("train", "--config", str(TINY), f"run.storage_path={folder}", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    return result, Path(result["run"])


NINE_ITERATIONS = (
    "train.max_steps=18", "sampler.actors=2", "train.keep_snapshots=true", "loss.margin=20"
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    return tiny(tmp_path_factory.mktemp("runs"), *NINE_ITERATIONS)


def negatives_of(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "negatives").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.mark.slow
@pytest.mark.beside
def test_the_result_says_what_was_trained(tiny_run: tuple[dict[str, Any], Path]) -> None:
    result, folder = tiny_run
    assert result["steps"] == 18
    assert result["accuracy"]["split"] == "test"
    assert result["accuracy"]["n"] == 16
    assert result["negatives"]["engine"] == "transformers"
    assert result["negatives"]["requested"] == 72
    assert 0 < result["negatives"]["used"] <= 72
    assert (result["negatives"]["lag_min"], result["negatives"]["lag_max"]) == (0, 2)
    assert result["negatives"]["active_fraction"] > 0
    assert result["judge"] == {"pretrained_steps": 5, "updates": 9, "reused": False}
    assert result["data"]["simulated"] is True
    assert json.loads((folder / "result.json").read_text()) == result
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().strip().split("\n")]
    assert [m["step"] for m in metrics if "step" in m] == list(range(18))


@pytest.mark.slow
@pytest.mark.beside
def test_every_negative_is_from_its_snapshot_and_every_question_has_its_own(
    tiny_run: tuple[dict[str, Any], Path],
) -> None:
    _, folder = tiny_run
    config = load_config(folder / "config.yaml")
    table = open_rationale_table(folder / "data" / "train.arrow")
    order = DataOrder(table.num_rows, config.train.batch_size, config.train.seed)
    ids = table.column("id").to_pylist()
    rows = negatives_of(folder)
    for row in rows:
        assert row["iteration"] == row["step"] // 2
        assert row["snapshot"] == max(0, row["iteration"] - 2)
    expected = [(step, ids[index], 0) for step in range(18) for index in order.batch(step)]
    assert [(row["step"], row["id"], row["negative_index"]) for row in rows] == expected
    assert len({row["seed"] for row in rows}) == len(rows)


@pytest.mark.slow
@pytest.mark.beside
def test_the_log_probabilities_prove_where_negatives_come_from(tiny_run: tuple[dict[str, Any], Path]) -> None:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from qcrd_ray.rationales.streaming import student_tools
    from qcrd_ray.tasks.prompts import EXPLAIN

    _, folder = tiny_run
    config = load_config(folder / "config.yaml")
    table = open_rationale_table(folder / "data" / "train.arrow")
    questions = {row["id"]: row["question"] for row in table.to_pylist()}
    tokenizer, task = student_tools(str(folder / "scratch_student"), config)
    snapshots = {int(path.name): path for path in (folder / "snapshots").iterdir()}
    assert sorted(snapshots) == [0, 1, 2, 3, 4, 5, 6, 9]  # what iterations sample from, and the last student
    checked, elsewhere = 0, []
    for number in range(7):
        others = [other for other in (number - 1, number + 1) if other in snapshots]
        models = {n: AutoModelForSeq2SeqLM.from_pretrained(snapshots[n]).eval() for n in [number, *others]}
        for row in negatives_of(folder):
            if row["snapshot"] != number or not row["token_ids"]:
                continue
            ids = row["token_ids"] + ([tokenizer.end] if row["finish_reason"] == "stop" else [])
            prompt, _ = tokenizer.prompt(EXPLAIN, task.student_input(questions[row["id"]], None))
            means = {}
            for n, model in models.items():
                with torch.no_grad():
                    means[n] = -float(model(input_ids=torch.tensor([prompt]), labels=torch.tensor([ids])).loss)
            assert means[number] == pytest.approx(row["mean_logprob"], abs=1e-3)
            elsewhere += [abs(means[n] - row["mean_logprob"]) for n in others]
            checked += 1
    assert checked >= 60
    # A text may by chance be as likely under a neighbour; hardly any is.
    assert sum(difference > 1e-3 for difference in elsewhere) >= 0.97 * len(elsewhere)
    assert sorted(elsewhere)[len(elsewhere) // 2] > 0.05


@pytest.mark.slow
@pytest.mark.beside
def test_an_engine_that_does_not_hold_its_snapshot_is_found_out(tiny_run: tuple[dict[str, Any], Path]) -> None:
    from qcrd_ray.run_folder import RunFolder
    from qcrd_ray.sampling.pool import Sampler
    from qcrd_ray.sampling.snapshot import Snapshot, WrongWeights
    from qcrd_ray.sampling.student_engine import engine_spec

    _, folder = tiny_run
    config = load_config(folder / "config.yaml")
    run = RunFolder(str(folder.parent), folder.name)
    sampler = Sampler(config, run, engine_spec(config), "")
    snapshots = [Snapshot.of(run, number, run.snapshot(number)) for number in (2, 3)]
    first, second = (sampler.predict("test", 0, 1, snapshot) for snapshot in snapshots)
    assert first[0].id == second[0].id
    sampler.engine.load_weights = lambda folder: None  # type: ignore[method-assign]
    with pytest.raises(WrongWeights, match=r"snapshots/000002: the engine gives the probe texts .* does not hold"):
        sampler.predict("test", 0, 1, snapshots[0])
    assert sampler.holds is None


@pytest.mark.slow
@pytest.mark.beside
def test_a_complete_run_is_not_done_again_and_another_config_is_refused(tiny_run: tuple[dict[str, Any], Path]) -> None:
    result, folder = tiny_run
    again, _ = tiny(folder.parent, *NINE_ITERATIONS)
    assert again == result
    done = run(
        "train", "--config", str(TINY), f"run.storage_path={folder.parent}", f"run.name={folder.name}", "loss.beta=0.3",
        *NINE_ITERATIONS,
    )  # fmt: skip
    assert done.returncode == 2
    assert "loss.beta (0.2 there, 0.3 here)" in done.stderr.strip().splitlines()[-1]
    never = run(
        "train", "--config", str(TINY), f"run.storage_path={folder.parent}", "run.resume=never", *NINE_ITERATIONS
    )
    assert never.returncode == 2
    assert "run.resume=never" in never.stderr


@pytest.mark.slow
@pytest.mark.beside
def test_the_student_loads_and_writes_what_was_scored(tiny_run: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    result, folder = tiny_run
    done = run(
        "evaluate", "--config", str(TINY), f"student.model={folder / 'student'}", "evaluation.split=test",
        f"output={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scored = json.loads(done.stdout.splitlines()[-1])
    assert scored["accuracy"] == result["accuracy"]["after"]
    assert scored["n"] == 16
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    questions = {row["id"]: row["question"] for row in open_rationale_table(folder / "data" / "test.arrow").to_pylist()}
    for line in (tmp_path / "predictions-test.jsonl").read_text().strip().split("\n"):
        prediction = json.loads(line)
        prompt = tokenizer(f"<Predict> {questions[prediction['id']]}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            ids = model.generate(torch.tensor([[*prompt, tokenizer.eos_token_id]]), max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == prediction["prediction"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["optim.lrr=1"], "config key optim.lrr: unknown; did you mean optim.lr?"),
        (["optim.lr=fast"], "config key optim.lr"),
        (["train.zero_stage=4"], "config key train.zero_stage"),
        (["student.model=/nowhere/student"], "config key student.model: no model at '/nowhere/student'"),
        (["student.model=scratch:t5"], "scratch:t5 is unknown; expected one of scratch:t5-tiny, scratch:llama-tiny"),
        (["judge.encoder=/nowhere/encoder"], "config key judge.encoder"),
        (["negatives.source=fixed"], "negatives.checkpoint"),
        (["negatives.source=fixed", "negatives.checkpoint=/nowhere"], "/nowhere is no student folder"),
        (["sampler.engine=vllm"], "vllm runs no encoder-decoder student"),
        (["teacher.engine=recorded"], "set teacher.engine=scripted"),
        (["task=svamp", "teacher.engine=recorded", "data.path=/nowhere"], "/nowhere not found"),
        (["run.name=../up"], "is no folder name"),
        (["run.resume=must"], "there is no run at"),
        (["train.deepspeed=/nowhere.json"], "train.deepspeed: /nowhere.json: not found"),
        (["--config", "jobs/configs/tinny.yaml"], "not found; did you mean"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert expected in refused_run(capfd, tmp_path, *arguments)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, but train.zero_stage is 0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, but train.precision is fp32"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is decided by optim.lr"),
        ([], "expected a JSON object"),
    ],
)
def test_a_deepspeed_json_that_contradicts_the_config(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], settings: Any, expected: str
) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(settings))
    assert expected in refused_run(capfd, tmp_path, f"train.deepspeed={file}")


def refused_run(capfd: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """The one line that a run ends with which leaves nothing."""
    given = ["--config", str(TINY), f"run.storage_path={folder / 'runs'}", *arguments]
    last = refused(capfd, lambda: job_main("train", "", script("jobs/train.py").run, given))
    assert not (folder / "runs").exists()
    return last


@pytest.mark.slow
@pytest.mark.beside
def test_paths_are_relative_to_where_the_job_was_started(tmp_path: Path) -> None:
    """In its workers too. Here with every sample from the student of the same iteration, and dropout."""
    (tmp_path / "deepspeed.json").write_text("{}")
    result, folder = tiny(
        Path("runs"), "train.max_steps=5", "train.deepspeed=deepspeed.json", "judge.store=judges", "scheme=sampling",
        "negatives.count=2", "negatives.lag=0", "student.dropout=0.1", "positives=gold", cwd=tmp_path,
    )  # fmt: skip
    assert folder.parent == tmp_path / "runs"
    assert result["steps"] == 5
    assert list((tmp_path / "judges").iterdir())
    assert {row["snapshot"] for row in negatives_of(folder)} == {0, 1, 2}


@pytest.mark.slow
@pytest.mark.beside
def test_data_without_a_held_out_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    row = {"id": "a", "question": "q", "answer": "1", "teacher_samples": [{"rationale": "r", "answer": "1"}]}
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(row) + "\n")
    done = run(
        "train", "--config", str(TINY), f"run.storage_path={tmp_path / 'runs'}", "task=svamp",
        "teacher.engine=recorded", f"data.path={tmp_path / 'data'}",
    )  # fmt: skip
    assert done.returncode == 2
    assert "has no valid and no test split" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "runs").exists()
