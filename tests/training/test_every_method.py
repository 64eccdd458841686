"""Every method, ablation, scheme, source of negatives and kind of label trains a small student, in one Ray session."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from qcrd_ray.config import ExperimentConfig, load_config
from qcrd_ray.training.trainer import session, train

TINY = Path(__file__).parents[2] / "jobs" / "configs" / "tiny.yaml"
STEPS = 10
NOTHING_NEW = ["positives=first", "negatives.source=none", "judge.enabled=false"]

METHODS = ["finetune", "single_task", "dss", "mi", "qcrd", "mi+qcrd"]
ABLATIONS = [
    NOTHING_NEW[:1], NOTHING_NEW[1:2], NOTHING_NEW[2:], NOTHING_NEW[:2], NOTHING_NEW[1:], NOTHING_NEW[::2], NOTHING_NEW
]  # fmt: skip
SCHEMES = ["max_min", "sampling", "mean", "weighted_mean"]
SOURCES = ["fixed", "self_consistency", "lagged+self_consistency", "fixed+self_consistency"]
LABELS = ["gold", "teacher_sample", "teacher_vote"]
CASES = [
    *([f"method={name}"] for name in METHODS),
    *ABLATIONS,
    *([f"scheme={name}"] for name in SCHEMES),
    *([f"negatives.source={name}"] for name in SOURCES),
    *([f"labels={name}", f"method={method}"] for name, method in zip(LABELS, ("mi+qcrd", "dss", "qcrd"), strict=True)),
]


def config_of(folder: Path, *overrides: str) -> ExperimentConfig:
    everywhere = [f"run.storage_path={folder}", f"judge.store={folder}", f"train.max_steps={STEPS}"]
    return load_config(TINY, [*everywhere, *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("runs")
    with session(config_of(folder)):
        yield folder


def trained(folder: Path, *overrides: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result of a run, and its steps' metrics. A run that is complete is not done again."""
    result = train(config_of(folder, *overrides))
    lines = (Path(result["run"]) / "metrics.jsonl").read_text().splitlines()
    return result, [record for record in map(json.loads, lines) if "step" in record]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_it_trains(folder: Path, overrides: list[str]) -> None:
    given = list(overrides)
    if "fixed" in given[0]:  # from a student of the same tokenizer
        student = Path(trained(folder, "method=dss")[0]["run"]) / "student"
        given += [f"negatives.checkpoint={student}", f"student.model={student}"]
    config = config_of(folder, *given)
    result, steps = trained(folder, *given)
    assert (result["steps"], result["method"], len(steps)) == (STEPS, config.method, STEPS)
    assert all(abs(step["loss"]) < 100 and step["loss_label"] > 0 for step in steps)

    learns_rationales = config.method not in ("finetune", "single_task")
    assert all((step["loss_positive"] > 0) is learns_rationales for step in steps)
    assert all(("loss_mutual_information" in step) is config.couples_tasks for step in steps)
    sampled = config.is_contrastive and config.negatives.source not in ("none", "self_consistency")
    assert (result["negatives"]["requested"] > 0) is sampled
    files = list(Path(result["run"]).glob("negatives/*.parquet"))
    snapshots = {snapshot for file in files for snapshot in pq.read_table(file).column("snapshot").to_pylist()}
    fixed = config.negatives.source.startswith("fixed")
    assert snapshots == (set() if not sampled else {-1} if fixed else {0, 1, 2})
    judged = config.is_contrastive and config.judge.enabled
    assert (result["judge"]["updates"] > 0) is judged
    scored = judged and config.scheme != "mean"
    assert any(step["score_positive"] is not None for step in steps) is scored


@pytest.mark.slow
def test_qcrd_with_all_of_it_off_is_dss_to_the_digit(folder: Path) -> None:
    _, dss = trained(folder, "method=dss")
    _, off = trained(folder, *NOTHING_NEW)
    keys = ("step", "rows", "loss", "loss_label", "loss_positive", "gradient_norm", "tokens")
    assert [[step[key] for key in keys] for step in off] == [[step[key] for key in keys] for step in dss]
