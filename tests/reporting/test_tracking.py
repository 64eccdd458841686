"""What TensorBoard, Weights & Biases and MLflow have of a run, through their own libraries, whatever befalls it."""

from __future__ import annotations

import json
import logging
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcrd_ray.config import ExperimentConfig, load_config
from qcrd_ray.errors import UserError
from qcrd_ray.reporting import tracking
from qcrd_ray.reporting.follower import Follower
from qcrd_ray.reporting.tracking import check_tracking, hyperparameters, open_trackers, values_of
from qcrd_ray.run_folder import EVALUATIONS_SUMMARY, Metrics, RunFolder
from tests.faults.runs import until
from tests.reporting.observed import STEPS, Observed
from tests.s3_server import s3_server


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[tuple[dict[str, Any], bool]] = []
        self.evaluations: list[tuple[int, bool]] = []

    def record(self, record: dict[str, Any], before: bool) -> None:
        self.records.append((record, before))

    def evaluation(self, entry: dict[str, Any], before: bool) -> None:
        self.evaluations.append((entry["step"], before))

    @property
    def steps(self) -> list[tuple[int, float]]:
        return [(record["step"], record["loss"]) for record, _ in self.records]


def line(step: int, attempt: int = 0) -> dict[str, Any]:
    """A step's metrics; its seconds differ between attempts, its loss does not."""
    return {"step": step, "loss": 4.0 - step / 8, "tokens": 100, "seconds": 0.5 + attempt, "judge_loss": None}


def evaluated(run: RunFolder, *steps: int) -> None:
    entries = [{"step": s, "snapshot": s // 2, "split": "valid", "accuracy": s / 100, "n": 16} for s in steps]
    run.write(EVALUATIONS_SUMMARY, json.dumps(entries))


def run_in(folder: Path | str) -> RunFolder:
    run = RunFolder(str(folder), "run")
    run.create()
    return run


def test_a_follower_tells_what_a_resume_wrote_anew_and_nothing_else_twice(tmp_path: Path) -> None:
    run, heard = run_in(tmp_path), Heard()
    metrics = Metrics(run)
    for step in range(3):
        metrics.add(line(step))
    evaluated(run, 0)
    with Follower(run, [heard]) as follower:
        follower.start()
        until(lambda: len(heard.records) == 3 and len(heard.evaluations) == 1)
        for step in range(3, 10):
            metrics.add(line(step))
        evaluated(run, 0, 8)
        until(lambda: len(heard.records) == 10 and len(heard.evaluations) == 2)
        metrics.begin(8)
        for step in range(8, 14):  # longer at once than it was
            metrics.add(line(step, attempt=1))
        evaluated(run, 0, 8, 12)
    assert [record["step"] for record, _ in heard.records] == [*range(10), *range(8, 14)]
    assert [before for _, before in heard.records] == [True] * 3 + [False] * 13
    assert heard.evaluations == [(0, True), (8, False), (12, False)]


def test_a_follower_waits_for_the_records_of_an_evaluations_step(tmp_path: Path) -> None:
    run, heard = run_in(tmp_path), Heard()
    metrics = Metrics(run)
    evaluated(run, 4)
    with Follower(run, [heard]) as follower:
        follower.start()
        for step in range(3):
            metrics.add(line(step))
        until(lambda: len(heard.records) == 3)
        assert heard.evaluations == []
        metrics.add(line(3))
        until(lambda: len(heard.evaluations) == 1)


# The three trackers


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentConfig:
    monkeypatch.delenv("WANDB_DIR", raising=False)
    return config_of(tmp_path)


def config_of(folder: Path, *overrides: str) -> ExperimentConfig:
    return load_config(None, [
        f"run.storage_path={folder}", "run.name=run", "tracking.tensorboard=true", "tracking.wandb.project=tests",
        "tracking.wandb.mode=offline", "tracking.mlflow.experiment=tests",
        f"tracking.mlflow.uri=sqlite:///{folder}/mlflow.db", *overrides,
    ])  # fmt: skip


def session(config: ExperimentConfig, run: RunFolder, first: int, last: int, *evaluations: int) -> None:
    """Train steps first..last-1, and fail there unless it is the last."""
    metrics = Metrics(run)
    with open_trackers(config, run) as trackers, Follower(run, trackers) as follower:
        follower.start()
        metrics.begin(first)
        for step in range(first, last):
            metrics.add(line(step))
        metrics.flush()
        evaluated(run, *evaluations)
        if last < 14:
            raise InterruptedError("the cluster is gone")


def in_tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        scalars = events.Scalars(name)
        assert len({event.step for event in scalars}) == len(scalars), f"{name} has a step twice"
        found[name] = {event.step: event.value for event in scalars}
    return found


def in_wandb(folder: Path) -> tuple[list[Any], list[dict[str, Any]]]:
    """The runs and the rows of all sessions, from the log that `wandb sync` reads (LevelDB's format)."""
    from wandb.proto import wandb_internal_pb2

    runs, rows = [], []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        data, position, record = file.read_bytes(), 7, b""
        while position + 7 <= len(data):
            left = 32768 - position % 32768
            length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
            if left < 7 or kind == 0:
                position += left
                continue
            record += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # whole, or the last part
                found = wandb_internal_pb2.Record.FromString(record)
                record = b""
                if found.HasField("run"):
                    runs.append(found.run)
                if found.HasField("history"):
                    items = found.history.item
                    rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return runs, rows


def in_mlflow(folder: Path) -> tuple[Any, Callable[[str], dict[int, float]]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("tests").experiment_id])

    def history(name: str) -> dict[int, float]:
        metrics = client.get_metric_history(run.info.run_id, name)
        assert len({metric.step for metric in metrics}) == len(metrics), f"{name} has a step twice"
        return {metric.step: metric.value for metric in metrics}

    return run, history


def test_a_resume_logs_no_step_twice_and_misses_none(config: ExperimentConfig, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    with pytest.raises(InterruptedError):
        session(config, run, 0, 10, 0, 8)
    assert in_mlflow(tmp_path)[0].info.status == "FAILED"
    # What a SIGKILL leaves between a tracker's log and its state: steps 7 to 10 are logged, and not known to be.
    for name in ("tensorboard", "mlflow"):
        file = tmp_path / "run" / "tracking" / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"step": 6, "evaluations": [[0, "valid"]]}))
    session(config, run, 8, 14, 0, 8, 14)

    losses = {step + 1: line(step)["loss"] for step in range(14)}
    accuracies = {0: 0.0, 8: pytest.approx(0.08), 14: pytest.approx(0.14)}
    board = in_tensorboard(tmp_path / "run")
    assert board["train/loss"] == losses
    assert board["evaluation/valid/accuracy"] == accuracies
    assert set(board["train/tokens_per_second"].values()) == {200.0}
    assert "judge/loss" not in board

    started, rows = in_wandb(tmp_path / "run")
    assert len({one.run_id for one in started}) == 1
    assert {row["step"]: row["train/loss"] for row in rows if "step" in row} == losses
    assert [row["step"] for row in rows if "step" in row] == list(range(1, 15))
    assert [row["evaluation/step"] for row in rows if "evaluation/step" in row] == [0, 8, 14]
    assert [row["_step"] for row in rows] == list(range(17))

    logged, history = in_mlflow(tmp_path)
    assert logged.info.status == "FINISHED"
    assert history("train/loss") == losses
    assert logged.data.tags["qcrd_ray.run"] == str(run)


def test_a_tracker_that_is_switched_on_later_gets_the_whole_run(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    for step in range(6):
        Metrics(run).add(line(step))
    config = config_of(tmp_path, "tracking.wandb.project=null", "tracking.mlflow.experiment=null")
    session(config, run, 4, 14)
    assert sorted(in_tensorboard(tmp_path / "run")["train/loss"]) == list(range(1, 15))


def test_a_tracker_that_comes_back_gets_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.05)
    database = tmp_path / "away"
    database.write_text("a file, where a folder should be")
    overrides = ["tracking.wandb.project=null", f"tracking.mlflow.uri=sqlite:///{database}/mlflow.db"]
    config, run = config_of(tmp_path, *overrides), run_in(tmp_path)
    metrics = Metrics(run)
    with (
        caplog.at_level(logging.WARNING, "qcrd_ray"),
        open_trackers(config, run) as trackers,
        Follower(run, trackers) as follower,
    ):
        follower.start()
        metrics.add(line(0))
        until(lambda: "mlflow failed" in caplog.text)
        until(lambda: (tmp_path / "run" / "tracking" / "tensorboard.json").exists())  # the other one goes on
        database.unlink()
        database.mkdir()
        metrics.add(line(1))
    assert len(caplog.records) == 1
    assert sorted(in_mlflow(database)[1]("train/loss")) == [1, 2]


def test_a_tracker_that_stays_away_is_left_behind_with_a_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    config = config_of(tmp_path, "tracking.wandb.project=null", "tracking.mlflow.uri=null")
    with caplog.at_level(logging.WARNING, "qcrd_ray"):
        session(config, run_in(tmp_path), 0, 14)
    first, last = [record.getMessage() for record in caplog.records]
    assert first.startswith("mlflow failed, ")
    assert "secret" not in caplog.text
    assert "mlflow did not get 14 of the run's points" in last
    assert sorted(in_tensorboard(tmp_path / "run")["train/loss"]) == list(range(1, 15))


def test_event_files_are_copied_to_a_bucket_also_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCRD_CACHE", str(tmp_path / "cache"))
    with s3_server("tracked") as server:
        overrides = ["tracking.wandb.project=null", "tracking.mlflow.experiment=null"]
        config = config_of(tmp_path, f"run.storage_path={server.uri('tracked/runs')}", *overrides)
        run = run_in(config.run.storage_path)
        with pytest.raises(InterruptedError):
            session(config, run, 0, 10, 0, 8)
        session(config, run, 8, 14, 0, 8, 14)
        names = run.list("tensorboard")
        (tmp_path / "tensorboard").mkdir()
        for name in names:
            (tmp_path / "tensorboard" / name).write_bytes(run.read(f"tensorboard/{name}"))
    assert len(names) == 2
    assert sorted(in_tensorboard(tmp_path)["train/loss"]) == list(range(1, 15))


# What is found before a run starts


@pytest.mark.parametrize(("library", "key"), [
    ("tensorboard", "tracking.tensorboard"), ("wandb", "tracking.wandb.project"),
    ("mlflow", "tracking.mlflow.experiment"),
])  # fmt: skip
def test_a_missing_library_is_named_with_its_extra(
    library: str, key: str, config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(config.run.storage_path, "run")
    check_tracking(config, run)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"config key {key}: {library} is not installed; .*qcrd_ray\[tracking\]"):
        check_tracking(config, run)
    check_tracking(load_config(None, []), run)


def test_weights_and_biases_online_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    config, run = config_of(tmp_path, "tracking.wandb.mode=online"), RunFolder(str(tmp_path), "run")
    with pytest.raises(UserError, match="set WANDB_API_KEY"):
        check_tracking(config, run)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    check_tracking(config, run)
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check_tracking(config, run)


def test_weights_and_biases_offline_needs_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_DIR", raising=False)
    bucket = RunFolder("s3://bucket/runs", "run")
    with pytest.raises(UserError, match="WANDB_DIR"):
        check_tracking(config_of(tmp_path), bucket)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    check_tracking(config_of(tmp_path), bucket)


@pytest.mark.parametrize("uri", ["https://user:password@mlflow.example", "https://mlflow.example?token=abc"])
def test_a_uri_with_a_key_is_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(UserError, match="holds a key") as refused:
        load_config(None, [f"tracking.mlflow.uri={uri}"])
    assert uri not in str(refused.value)


def test_tracking_is_no_part_of_what_is_learned(config: ExperimentConfig) -> None:
    assert config.identity() == load_config(None, []).identity()


def test_values_and_hyperparameters_are_numbers_and_plain_text() -> None:
    record = {"step": 3, "rows": [1, 2], "loss": 1.5, "lag": None, "judge_loss": 0.5, "tokens": 30, "seconds": 0.5}
    assert values_of(record) == {
        "train/loss": 1.5, "judge/loss": 0.5, "train/tokens": 30.0, "train/seconds": 0.5,
        "train/tokens_per_second": 60.0,
    }  # fmt: skip
    flat = hyperparameters(load_config(None, ["optim.lr=1e-4", "train.precision=bf16", "data.teachers=[a, b]"]))
    assert (flat["optim.lr"], flat["train.precision"], flat["data.teachers"]) == (1e-4, "bf16", '["a", "b"]')
    assert flat["run.name"] == "null"


# A run from end to end


@pytest.mark.slow
def test_a_run_is_in_all_three(observed: Observed) -> None:
    records = [json.loads(text) for text in (observed.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "step" in record]
    expected = {record["step"] + 1: pytest.approx(record["loss"]) for record in steps}
    accuracies = {
        entry["step"]: entry["accuracy"] for entry in observed.result["evaluations"] if entry["split"] == "valid"
    }
    assert sorted(accuracies) == [0, STEPS]

    board = in_tensorboard(observed.folder)
    assert board["train/loss"] == expected
    assert board["evaluation/valid/accuracy"] == {s: pytest.approx(a) for s, a in accuracies.items()}
    assert {"train/lr", "train/active_fraction", "train/tokens_per_second", "train/wait_seconds", "judge/loss",
            "judge/pretrain_loss"} <= set(board)  # fmt: skip

    [started], rows = in_wandb(observed.folder)
    assert (started.project, started.display_name) == ("tests", "observed")
    assert json.loads({item.key: item.value_json for item in started.config.update}["optim"])["lr"] == 1e-3
    assert {row["step"]: row["train/loss"] for row in rows if "train/loss" in row} == expected
    assert Counter(key for row in rows for key in row if key.endswith("/accuracy")) == {
        "evaluation/valid/accuracy": 2,
        "evaluation/test/accuracy": 2,
    }

    logged, history = in_mlflow(observed.base)
    assert history("train/loss") == expected
    assert history("evaluation/valid/accuracy") == accuracies
    assert (logged.info.status, logged.info.run_name) == ("FINISHED", "observed")
    assert logged.data.params["student.model"] == "scratch:t5-tiny"
    assert len(logged.data.params) > 100
