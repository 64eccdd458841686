"""The order of trials, without running them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qcrd_ray.config import config_from_dict
from qcrd_ray.run_folder import RunFolder
from qcrd_ray.sweeps.proposals import OptunaProposer
from qcrd_ray.sweeps.queue import TrialQueue, judge_group
from qcrd_ray.sweeps.space import Axis, Choice, Point, Trial, axis_of_key, configure, cross, trials_of
from qcrd_ray.sweeps.trial import JUDGE_READY

BASE = config_from_dict({"task": "chain_sum", "train": {"max_steps": 10}})
K = cross([axis_of_key("negatives.count", [1, 2])])


def launch(trial: Trial) -> dict[str, Any]:
    return {"trial": trial.name}


def given(queue: TrialQueue, number: int) -> Any:
    found = queue.suggest(f"id{number}")
    return found["trial"] if isinstance(found, dict) else found


def ends(queue: TrialQueue, number: int, accuracy: float | None = 0.5, status: str = "finished") -> None:
    queue.on_trial_complete(f"id{number}", {"accuracy": accuracy, "status": status})


def test_trials_that_share_a_discriminator_wait_for_the_one_that_pretrains_it() -> None:
    trials = list(trials_of(BASE, K.grid(), 2))
    one_0, two_0, one_1, two_1 = (trial.name for trial in trials)
    queue = TrialQueue(trials, launch, {}, {})
    assert given(queue, 0) == one_0
    assert given(queue, 1) == one_1  # of another seed, so with another discriminator
    assert given(queue, 2) is None
    queue.on_trial_result("id0", {JUDGE_READY: True})
    assert given(queue, 2) == two_0
    assert given(queue, 3) is None
    ends(queue, 1, None, "failed")  # it may have failed before: the next one pretrains
    assert given(queue, 3) == two_1
    for number in (0, 2, 3):
        ends(queue, number)
    assert given(queue, 4) == "FINISHED"


def test_trials_without_a_discriminator_wait_for_nobody() -> None:
    trials = list(trials_of(configure(BASE, {"judge.enabled": False}), K.grid(), 2))
    queue = TrialQueue(trials, launch, {}, {})
    assert [given(queue, number) for number in range(4)] == [trial.name for trial in trials]
    assert given(queue, 4) == "FINISHED"


def test_what_decides_the_discriminator_decides_the_group() -> None:
    same = [{"negatives.count": 3}, {"negatives.temperature": 0.7}, {"scheme": "mean"}, {"optim.lr": 0.1}]
    other = [{"teacher.samples": 1}, {"train.seed": 1}, {"judge.lr": 0.1}, {"data.share": 0.5}, {"train.workers": 2}]
    assert {judge_group(configure(BASE, keys)) for keys in same} == {judge_group(BASE)}
    assert len({judge_group(configure(BASE, keys)) for keys in other} | {judge_group(BASE)}) == len(other) + 1


def test_finished_trials_are_not_given_again() -> None:
    trials = list(trials_of(BASE, K.grid(), 2))
    queue = TrialQueue(trials, launch, {trials[0].name: 0.5, trials[3].name: 0.1}, {})
    assert {given(queue, 0), given(queue, 1)} == {trials[1].name, trials[2].name}
    assert given(queue, 2) == "FINISHED"


def test_a_trial_waits_for_the_student_that_it_needs_and_goes_with_it() -> None:
    source = Axis("source", "", (Choice("fixed", {"negatives.source": "fixed"}, pretrained={"method": "dss"}),))
    trials = list(trials_of(BASE, cross([source]).grid(), 2))
    maker_0, taker_0, maker_1, _ = (trial.name for trial in trials)
    queue = TrialQueue(trials, launch, {}, {})
    assert given(queue, 0) == maker_0
    assert given(queue, 1) == maker_1
    assert given(queue, 2) is None
    ends(queue, 0)
    assert given(queue, 2) == taker_0
    ends(queue, 1, None, "failed")
    assert given(queue, 3) == "FINISHED"  # nobody will make what the last one needs
    ends(queue, 2)


def test_a_closed_queue_gives_nothing() -> None:
    queue = TrialQueue(trials_of(BASE, K.grid(), 1), launch, {}, {})
    queue.close()
    assert given(queue, 0) == "FINISHED"


def optuna_queue(
    folder: RunFolder, finished: dict[str, float], count: int = 6, stopped: dict[str, float | None] | None = None
) -> TrialQueue:
    space = cross([axis_of_key("optim.lr", {"loguniform": [1e-5, 1e-2]}), axis_of_key("loss.beta", [0.1, 0.4])])
    proposer = OptunaProposer(space, count, seed=0, folder=folder)

    def expand(point: Point) -> list[Trial]:
        return list(trials_of(configure(BASE, {"judge.enabled": False}), [point], 2))

    return TrialQueue([], launch, finished, stopped or {}, proposer, expand)


def test_optuna_proposes_again_what_it_had_proposed(tmp_path: Path) -> None:
    """A sweep that is killed and started again: the same points, those that are done not run again, then new ones."""
    pytest.importorskip("optuna")
    folder = RunFolder(str(tmp_path), "sweep")
    folder.create()
    queue = optuna_queue(folder, {})
    before = [given(queue, number) for number in range(6)]  # three points of two seeds
    assert all(isinstance(name, str) and name != "FINISHED" for name in before)
    for number in range(4):
        ends(queue, number, 0.1 * number)
    assert len(json.loads((tmp_path / "sweep" / "proposals.json").read_text())) == 3

    again = optuna_queue(folder, dict.fromkeys(before[:4], 0.1))
    assert [given(again, 0), given(again, 1)] == before[4:]
    rest = [given(again, number) for number in range(2, 8)]
    assert len(set(rest) | set(before)) == 12
    for number in range(8):
        ends(again, number, 0.3)
    assert given(again, 9) == "FINISHED"
    states = [trial.state.name for trial in again.proposer.study.trials]  # type: ignore[union-attr]
    assert states == ["COMPLETE"] * 6
    values = [trial.value for trial in again.proposer.study.trials]  # type: ignore[union-attr]
    assert values == pytest.approx([0.1, 0.1, 0.3, 0.3, 0.3, 0.3])


def test_optuna_hears_of_points_that_were_stopped_or_failed(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    folder = RunFolder(str(tmp_path), "sweep")
    folder.create()
    queue = optuna_queue(folder, {}, count=2)
    names = [given(queue, number) for number in range(4)]
    assert len(set(names)) == 4
    queue.on_trial_complete("id0", {"accuracy": 0.25, "step": 5})  # by a scheduler: what it had reached counts
    queue.on_trial_complete("id1", {"accuracy": 0.75, "status": "finished"})
    queue.on_trial_complete("id2", error=True)
    assert given(queue, 4) is None
    queue.on_trial_complete("id3", {"status": "failed"})
    assert given(queue, 5) == "FINISHED"
    found = [(trial.state.name, trial.value) for trial in queue.proposer.study.trials]  # type: ignore[union-attr]
    assert found == [("COMPLETE", 0.5), ("FAIL", None)]


def test_a_point_that_optuna_proposes_twice_is_run_once(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    folder = RunFolder(str(tmp_path), "sweep")
    folder.create()
    space = cross([axis_of_key("loss.beta", [0.1, 0.4])])
    proposer = OptunaProposer(space, 8, seed=0, folder=folder)
    queue = TrialQueue(
        [], launch, {}, {}, proposer, lambda p: list(trials_of(configure(BASE, {"judge.enabled": False}), [p], 1))
    )
    assert {given(queue, 0), given(queue, 1)} == {
        trial.name for trial in trials_of(configure(BASE, {"judge.enabled": False}), space.grid(), 1)
    }
    ends(queue, 0, 0.25)
    ends(queue, 1, 0.75)
    assert given(queue, 2) == "FINISHED"
    assert sorted({trial.value for trial in proposer.study.trials}) == [0.25, 0.75]
    assert len(proposer.study.trials) == 8


def test_what_a_scheduler_has_stopped_is_not_run_again_and_counts_with_what_it_reached(tmp_path: Path) -> None:
    trials = list(trials_of(BASE, K.grid(), 1))
    queue = TrialQueue(trials, launch, {}, {trials[0].name: 0.5})
    assert given(queue, 0) == trials[1].name
    assert given(queue, 1) == "FINISHED"

    pytest.importorskip("optuna")
    folder = RunFolder(str(tmp_path), "sweep")
    folder.create()
    queue = optuna_queue(folder, {}, count=1)
    names = [given(queue, number) for number in range(2)]
    again = optuna_queue(folder, {names[0]: 0.5}, count=1, stopped={names[1]: 0.25})
    assert not again.fill()
    assert [(t.state.name, t.value) for t in again.proposer.study.trials] == [("COMPLETE", 0.375)]  # type: ignore[union-attr]


def test_trials_without_a_discriminator_never_share_one() -> None:
    base = configure(BASE, {"judge.enabled": False})
    space = cross([axis_of_key("train.workers", [1, 2])])  # no part of what is learned
    trials = list(trials_of(base, space.grid(), 1))
    assert len({trial.name for trial in trials}) == 2
    queue = TrialQueue(trials, launch, {}, {})
    assert {given(queue, 0), given(queue, 1)} == {trial.name for trial in trials}


def test_a_proposed_point_that_does_not_go_together_is_left_out(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    folder = RunFolder(str(tmp_path), "sweep")
    folder.create()
    proposer = OptunaProposer(cross([axis_of_key("scheme", ["weighted_mean", "min_max"])]), 6, seed=0, folder=folder)
    base = configure(BASE, {"judge.enabled": False})  # weighted_mean weighs by it
    queue = TrialQueue([], launch, {}, {}, proposer, lambda point: list(trials_of(base, [point], 1)))
    assert given(queue, 0).startswith("scheme-min_max")
    ends(queue, 0)
    assert given(queue, 1) == "FINISHED"
    assert {trial.state.name for trial in proposer.study.trials} == {"COMPLETE", "FAIL"}
