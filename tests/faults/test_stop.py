"""A signal to the driver: training ends with a checkpoint at the step it is at, and goes on from there."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.runs import Run, audit, gone_after, steps_of

STEPS = 30
SETTINGS = (
    f"train.max_steps={STEPS}", "train.iteration_steps=6", "train.checkpoint_interval=1000", "train.log_interval=1",
    "judge.pretrain_steps=3",
)  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def stopped_by(run: Run, number: int) -> str:
    """Send a signal to the driver; gives the last line that it said. Nothing that it had started is left."""
    family = run.below("")
    run.process.send_signal(number)
    run.wait(code=128 + number, seconds=120)
    gone_after(family)
    assert "Traceback" not in run.said
    assert not (run.folder / "owner.json").exists()
    assert not (run.folder / "result.json").exists()
    return run.said.strip().splitlines()[-1]


def test_all_workers_stop_at_the_same_step(tmp_path: Path) -> None:
    with Run(tmp_path, "run", *SETTINGS, "train.workers=2", "train.zero_stage=2") as run:
        run.until_step(4)
        last = stopped_by(run, signal.SIGINT)
    [checkpoint] = (run.folder / "checkpoints").iterdir()
    step = int(checkpoint.name)
    assert last == f"stopped at step {step} of {STEPS}; the same command goes on from there"
    assert [record["step"] for record in steps_of(run.folder)] == list(range(step))

    with Run(tmp_path, "run", *SETTINGS) as again:
        result = again.wait()
    assert result["resumed_from_step"] == step
    assert result["steps"] == STEPS
    audit(run.folder)


def test_a_run_that_has_not_begun_ends_at_once(tmp_path: Path) -> None:
    with Run(tmp_path, "run", *SETTINGS) as run:
        run.until(lambda: "starting 1 sampler" in run.said)
        last = stopped_by(run, signal.SIGTERM)
    assert last.startswith(f"stopped before the first checkpoint of {STEPS} steps")
    assert steps_of(run.folder) == []
