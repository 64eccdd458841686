"""What a trial tells Ray Tune of its run."""

from __future__ import annotations

import json
from pathlib import Path

from qcrd_ray.run_folder import CHECKPOINTS, EVALUATIONS_SUMMARY, METRICS, RESULT, STUDENT, RunFolder
from qcrd_ray.sweeps.trial import JUDGE_READY, StopFlag, _News, remove_checkpoints


def test_a_run_s_first_metrics_and_each_evaluation_are_told_once(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path), "a")
    news = _News(run)
    assert news.take() == []  # there is no folder yet
    run.create()
    assert news.take() == []
    run.write(METRICS, json.dumps({"judge_pretrained_steps": 5}) + "\n")
    assert news.take() == [{JUDGE_READY: True}]
    assert news.take() == []
    evaluations = [
        {"split": "valid", "step": 0, "accuracy": 0.0},  # of the untouched student
        {"split": "valid", "step": 20, "accuracy": 0.5},
        {"split": "valid", "step": 10, "accuracy": 0.25},
        {"split": "test", "step": 10, "accuracy": 0.75},
    ]
    run.write(EVALUATIONS_SUMMARY, json.dumps(evaluations))
    assert news.take() == [{"step": 10, "accuracy": 0.25}, {"step": 20, "accuracy": 0.5}]
    assert news.take() == []
    run.write(EVALUATIONS_SUMMARY, json.dumps(evaluations)[:-1])  # in the making
    assert news.take() == []


def test_a_flag_stops_one_trial_or_all() -> None:
    flag = StopFlag()
    assert flag.get("a") is None
    flag.stop_trial("a")
    assert (flag.get("a"), flag.get("b")) == ("stopped", None)
    flag.stop_all()
    assert (flag.get("a"), flag.get("b")) == ("stopped", "interrupted")


def test_what_nothing_goes_on_from_is_removed_and_the_rest_stays(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path), "a")
    run.create()
    for folder in (f"{CHECKPOINTS}/00000010", run.snapshot(0), run.snapshot(3), STUDENT):
        with run.new_folder(folder) as place:
            (place / "model.safetensors").write_bytes(b"weights")
    run.write(RESULT, "{}")
    remove_checkpoints(run)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["result.json", "student"]
    assert run.has_folder(STUDENT)
    remove_checkpoints(run)  # of a run from which they are gone
