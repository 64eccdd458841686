"""Every method, ablation, scheme, source of negatives and kind of label trains a small student, in one Ray session."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from qcrd_ray.config import ExperimentConfig, load_config
from qcrd_ray.training.trainer import session, train

TINY = Path(__file__).parents[2] / "jobs" / "configs" / "tiny.yaml"
STEPS = 10
NOTHING_NEW = ["positives=first", "negatives.source=none", "judge.enabled=false"]

METHODS = {
    "finetune": "gold", "single_task": "gold", "dss": "gold", "mi": "teacher_sample", "qcrd": "gold",
    "mi+qcrd": "teacher_vote",
}  # fmt: skip
"""With the labels of each."""
ABLATIONS = [list(some) for count in (1, 2, 3) for some in itertools.combinations(NOTHING_NEW, count)]
"""Each alone, two, and all together."""
SCHEMES = {
    "max_min": "fixed+self_consistency", "sampling": "fixed", "mean": "lagged+self_consistency",
    "weighted_mean": "self_consistency",
}  # fmt: skip
"""With the source of negatives of each."""
CASES = [
    *([f"method={name}", f"labels={labels}"] for name, labels in METHODS.items()),
    *ABLATIONS,
    ["teacher.samples=1"],
    *([f"scheme={name}", f"negatives.source={source}"] for name, source in SCHEMES.items()),
]
CASES[-1].insert(0, "method=mi+qcrd")  # without samples of the student


def config_of(folder: Path, *overrides: str) -> ExperimentConfig:
    everywhere = [f"run.storage_path={folder}", f"judge.store={folder}", f"train.max_steps={STEPS}"]
    return load_config(TINY, [*everywhere, *overrides])


Steps = list[dict[str, Any]]
Trained = Callable[..., tuple[dict[str, Any], Steps]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Gives the result of a run, and its steps' metrics. Two runs go on at a time, all in one Ray session."""
    folder = tmp_path_factory.mktemp("runs")
    plain = ["method=dss", "labels=gold"]

    def train_one(overrides: list[str]) -> tuple[dict[str, Any], Steps]:
        given = list(overrides)
        if "fixed" in given[-1]:  # from a student of the same tokenizer
            student = Path(runs[" ".join(plain)].result()[0]["run"]) / "student"
            given += [f"negatives.checkpoint={student}", f"student.model={student}"]
        result = train(config_of(folder, *given))
        lines = (Path(result["run"]) / "metrics.jsonl").read_text().splitlines()
        return result, [record for record in map(json.loads, lines) if "step" in record]

    with session(config_of(folder, "train.workers=6")), ThreadPoolExecutor(2) as pool:
        runs: dict[str, Future[tuple[dict[str, Any], Steps]]] = {}
        for case in [plain, *(case for case in CASES if case != plain)]:
            runs[" ".join(case)] = pool.submit(train_one, case)
        yield lambda *overrides: runs[" ".join(overrides)].result()


@pytest.mark.slow
@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_it_trains(trained: Trained, overrides: list[str]) -> None:
    config = load_config(TINY, [one for one in overrides if "fixed" not in one])
    result, steps = trained(*overrides)
    assert (result["steps"], result["method"], len(steps)) == (STEPS, config.method, STEPS)
    assert all(abs(step["loss"]) < 100 and step["loss_label"] > 0 for step in steps)

    learns_rationales = config.method not in ("finetune", "single_task")
    assert all((step["loss_positive"] > 0) is learns_rationales for step in steps)
    assert all(("loss_mutual_information" in step) is config.couples_tasks for step in steps)
    sampled = config.is_contrastive and config.negatives.source not in ("none", "self_consistency")
    assert (result["negatives"]["requested"] > 0) is sampled
    files = list(Path(result["run"]).glob("negatives/*.parquet"))
    snapshots = {snapshot for file in files for snapshot in pq.read_table(file).column("snapshot").to_pylist()}
    fixed = "fixed" in overrides[-1]
    assert snapshots == (set() if not sampled else {-1} if fixed else {0, 1, 2})
    judged = config.is_contrastive and config.judge.enabled
    assert (result["judge"]["updates"] > 0) is judged
    scored = judged and config.scheme != "mean"
    assert any(step["score_positive"] is not None for step in steps) is scored


@pytest.mark.slow
def test_qcrd_with_all_of_it_off_is_dss_to_the_digit(trained: Trained) -> None:
    _, dss = trained("method=dss", "labels=gold")
    _, off = trained(*NOTHING_NEW)
    keys = ("step", "rows", "loss", "loss_label", "loss_positive", "gradient_norm", "tokens")
    assert [[step[key] for key in keys] for step in off] == [[step[key] for key in keys] for step in dss]
