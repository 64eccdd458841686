"""SIGKILL at a random moment: the run ends as if nobody had killed anything.

`QCRD_KILL_TRIALS` says how many trials of each kind there are, one by default; `make test-kill` makes five.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.runs import ROOT, TINY, Job, Run, audit, gone_after, kill, losses_of, records_of, steps_of

STEPS = 36
SETTINGS = (
    f"train.max_steps={STEPS}", "train.iteration_steps=6", "train.checkpoint_interval=10", "train.workers=2",
    "train.zero_stage=2", "sampler.actors=2", "train.eval_interval=18", "judge.pretrain_steps=3",
)  # fmt: skip
TRIALS = range(int(os.environ.get("QCRD_KILL_TRIALS", "1")))
SEED = int(os.environ.get("QCRD_KILL_SEED", "20"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run that nobody kills."""
    with Run(tmp_path_factory.mktemp("whole"), "run", *SETTINGS) as run:
        run.wait()
    audit(run.folder)
    return losses_of(run.folder)


def same_losses(folder: Path, expected: list[float]) -> None:
    found = losses_of(folder)
    worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    print(f"largest difference of a loss: {worst:.2e}")
    assert worst <= 1e-2


def moment(kind: str, trial: int) -> tuple[int, float, random.Random]:
    """A random step of the run to kill after, a fraction of a second after that, and what else is drawn."""
    draw = random.Random(f"{SEED} {kind} {trial}")
    return draw.randrange(5, STEPS - 10), draw.random() * 0.5, draw


@pytest.mark.parametrize("trial", TRIALS)
def test_a_sampler_and_then_a_training_worker_are_killed(tmp_path: Path, whole: list[float], trial: int) -> None:
    step, delay, draw = moment("sampler", trial)
    with Run(tmp_path, "run", *SETTINGS) as run:
        run.until_step(step - 5)
        time.sleep(delay)
        victim = draw.choice(run.below("ray::Sampler"))
        family = [victim, *victim.children(recursive=True)]
        kill(victim.pid)
        print(f"sampler killed after step {len(steps_of(run.folder))}; gone after {gone_after(family):.1f} s")
        run.until_step(step)
        time.sleep(delay)
        victim = draw.choice(run.below("RayTrainWorker"))
        killed_at = len(steps_of(run.folder))
        begin = time.monotonic()
        kill(victim.pid)
        result = run.wait()
    print(f"worker killed after step {killed_at}; the run ended {time.monotonic() - begin:.1f} s later")
    first, again = result["training_starts"]
    assert first == 0
    assert again % 10 == 0 and killed_at - 13 <= again <= killed_at + 1
    assert result["steps"] == STEPS
    assert result["resumed_from_step"] == 0
    audit(run.folder)
    same_losses(run.folder, whole)


@pytest.mark.parametrize("trial", TRIALS)
def test_a_vllm_sampler_of_a_causal_student_is_killed(tmp_path: Path, trial: int) -> None:
    """In bf16, with two workers under ZeRO-2 and a batch that they cannot share evenly."""
    step, delay, _ = moment("vllm", trial)
    settings = (*SETTINGS, "student.model=scratch:llama-tiny", "sampler.engine=auto", "sampler.precision=bf16",
                "sampler.actors=1", "train.precision=bf16", "train.batch_size=3", "judge.enabled=false",
                f"train.deepspeed={ROOT}/jobs/deepspeed/zero2.json")  # fmt: skip
    with Run(tmp_path, "run", *settings) as run:
        run.until_step(step // 2)
        time.sleep(delay)
        [victim] = run.below("ray::Sampler")
        family = [victim, *victim.children(recursive=True)]
        kill(victim.pid)
        half = run.folder / "negatives" / ".iteration-000003-chunk-0000.parquet.0123abcd.tmp"
        half.write_bytes(b"PAR1")  # as if it was killed in the middle of that file
        print(f"vLLM sampler killed after step {len(steps_of(run.folder))}; gone after {gone_after(family):.1f} s")
        result = run.wait()
    assert result["steps"] == STEPS
    assert result["negatives"]["engine"] == "vllm"
    audit(run.folder)

    job = [sys.executable, str(ROOT / "jobs" / "evaluate.py"), "--config", str(TINY), "evaluation.split=test"]
    student = f"student.model={run.folder / 'student'}"
    with Job([*job, student, "sampler.engine=vllm", "sampler.precision=bf16"], tmp_path / "evaluation.log") as again:
        scored = again.wait()
    assert (scored["engine"], scored["accuracy"]) == ("vllm", result["accuracy"]["after"])


@pytest.mark.parametrize("trial", TRIALS)
def test_the_driver_is_killed(tmp_path: Path, whole: list[float], trial: int) -> None:
    step, delay, _ = moment("driver", trial)
    with Run(tmp_path, "run", *SETTINGS) as run:
        run.until_step(step)
        time.sleep(delay)
        killed_at = len(steps_of(run.folder))
        print(f"driver killed after step {killed_at}; all gone after {run.kill_driver():.1f} s")
    complete = sorted(int(f.parent.name) for f in (run.folder / "checkpoints").glob("0*/manifest.json"))
    with Run(tmp_path, "run", *SETTINGS, "train.workers=1") as again:
        result = again.wait()
    assert result["resumed_from_step"] == (complete[-1] if complete else 0)
    assert killed_at - result["resumed_from_step"] <= 12
    assert result["steps"] == STEPS
    audit(run.folder)
    same_losses(run.folder, whole)
    evaluated = [e["step"] for e in result["evaluations"] if e["split"] == "valid"]
    assert evaluated == [0, 18, 36]
    assert [r for r in records_of(run.folder) if "judge_pretrained_steps" in r]


HEALTH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
"""A node that is gone is known in seconds; Ray's own settings take a quarter of a minute."""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that has no room for the whole run, and a second node."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "_system_config": HEALTH})
    try:
        found.add_node(num_cpus=2, labels={"node": "second"})
        found.wait_for_nodes()
        yield found
    finally:
        found.shutdown()


def kill_raylet(node: Any) -> list[psutil.Process]:
    """SIGKILL for a node's raylet. Gives the processes that it had."""
    [raylet] = [info.process for info in node.all_processes["raylet"]]
    family = psutil.Process(raylet.pid).children(recursive=True)
    raylet.kill()
    raylet.wait()  # as a zombie it would still be its workers' parent
    return [p for p in family if p.is_running() and "Agent" not in "".join(p.cmdline()[:1])]


@pytest.mark.parametrize("trial", TRIALS)
def test_a_node_is_killed_and_another_comes(tmp_path: Path, whole: list[float], cluster: Any, trial: int) -> None:
    step, delay, _ = moment("node", trial)
    [second] = cluster.worker_nodes
    with Run(tmp_path, "run", *SETTINGS, RAY_ADDRESS=cluster.address, RAY_AUTH_MODE="disabled") as run:
        run.until_step(step)
        time.sleep(delay)
        killed_at = len(steps_of(run.folder))
        begin = time.monotonic()
        family = kill_raylet(second)
        assert any("Sampler" in p.cmdline()[0] or "RayTrainWorker" in p.cmdline()[0] for p in family if p.is_running())
        print(f"node killed after step {killed_at}; its processes gone after {gone_after(family):.1f} s")
        cluster.add_node(num_cpus=2)
        result = run.wait()
    print(f"the run ended {time.monotonic() - begin:.1f} s after the kill")
    assert result["steps"] == STEPS
    audit(run.folder)
    same_losses(run.folder, whole)


def test_a_node_is_killed_and_none_is_left(tmp_path: Path, cluster: Any) -> None:
    [second] = cluster.worker_nodes
    # Without its samplers alone, training ends with another line.
    settings = (*SETTINGS, "run.placement_timeout_s=15", "sampler.timeout_s=120", "train.node_labels={node: second}")
    with Run(tmp_path, "run", *settings, RAY_ADDRESS=cluster.address, RAY_AUTH_MODE="disabled") as run:
        run.until_step(20)
        begin = time.monotonic()
        kill_raylet(second)
        run.wait(code=2, seconds=240)
    print(f"ended {time.monotonic() - begin:.1f} s after the kill")
    # Ray's own word about the node may come behind it.
    [last] = [line for line in run.said.splitlines() if line.startswith("error: ")]
    assert "asked for 2 workers of 1 CPU" in last
    assert "the cluster has 2 CPU" in last
    assert "the same command goes on from step" in last
    assert "Traceback" not in last
