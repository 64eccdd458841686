"""Runs that are started as a user starts them, killed, and held against what a run must have left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import psutil
import pyarrow.parquet as pq

from qcrd_ray.config import load_config
from qcrd_ray.rationales.order import DataOrder
from qcrd_ray.rationales.tables import open_rationale_table

ROOT = Path(__file__).parents[2]
TINY = ROOT / "jobs" / "configs" / "tiny.yaml"
SECONDS = 600
LEFTOVER_SECONDS = 30.0
"""After which no process of a dead sampler, worker or driver may be left."""


class Job:
    """A command in a process group of its own, whose last line of output is its result."""

    def __init__(self, command: Sequence[str], log: Path, **environment: str) -> None:
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **environment},
                start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def kill_driver(self) -> float:
        """SIGKILL for the driver alone. Gives the seconds after which all that it had started was gone."""
        family = self.below("")
        agents = self.below("Agent")  # Ray's own outlive a raylet for a while
        kill(self.process.pid)
        self.process.wait()
        return gone_after([process for process in family if process not in agents])

    def end(self) -> None:
        """SIGKILL for the driver and all that is below it."""
        for process in self.below("") if self.process.poll() is None else []:
            kill(process.pid)
        self.process.kill()
        self.process.wait()

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, code: int = 0, seconds: float = SECONDS) -> dict[str, Any]:
        """The result. The exit code must be `code`."""
        try:
            out, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {seconds} s:\n{self.said[-3000:]}") from None
        assert self.process.returncode == code, self.said[-4000:]
        lines = out.strip().splitlines()
        return json.loads(lines[-1]) if code == 0 else {}

    def until(self, what: Callable[[], bool], seconds: float = SECONDS) -> None:
        until(what, seconds, self.process, self.log)

    def below(self, name: str) -> list[psutil.Process]:
        """Processes below the driver whose title holds `name`."""
        return below(self.process.pid, name)


class Run(Job):
    """A training job.

    Args:
        before: what its command line begins with.
    """

    def __init__(
        self, folder: Path, name: str, *arguments: str, before: Sequence[str] = (), **environment: str
    ) -> None:
        self.folder = folder / name
        command = [*before, sys.executable, str(ROOT / "jobs" / "train.py"), "--config", str(TINY),
                   f"run.storage_path={folder}", f"run.name={name}", *arguments]  # fmt: skip
        super().__init__(command, folder / f"{name}.log", **environment)

    def until_step(self, step: int) -> None:
        self.until(lambda: len(steps_of(self.folder)) > step)


def until(
    what: Callable[[], bool],
    seconds: float = SECONDS,
    process: subprocess.Popen[Any] | None = None,
    log: Path | None = None,
) -> None:
    """Wait until `what` is so. An error, with the end of `log`, after `seconds` or once `process` has ended."""

    def said() -> str:
        return log.read_text(errors="replace")[-3000:] if log else ""

    end = time.monotonic() + seconds
    while not what():
        assert process is None or process.poll() is None, f"ended too early:\n{said()}"
        assert time.monotonic() < end, f"waited {seconds} s:\n{said()}"
        time.sleep(0.02)


def below(process: int, name: str) -> list[psutil.Process]:
    """Processes below one whose title holds `name`."""
    found = []
    for child in psutil.Process(process).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if name in " ".join(child.cmdline()):
                found.append(child)
    return found


def kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def end_ray(*nodes: subprocess.Popen[Any]) -> None:
    """End what `ray start --block` has started: SIGTERM, and SIGKILL for what is left of it."""
    family = [process for node in nodes if node.poll() is None for process in below(node.pid, "")]
    for node in reversed(nodes):
        node.send_signal(signal.SIGTERM)
    psutil.wait_procs(family, timeout=15)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for node in nodes:
        node.kill()
        node.wait()
    gone_after(family)


def gone_after(processes: list[psutil.Process], seconds: float = LEFTOVER_SECONDS) -> float:
    """Seconds until all of them were gone; an error where they are not after `seconds`."""
    begin = time.monotonic()
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    left = []
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process.cmdline())
    assert not left, f"left after {seconds} s: {left}"
    return time.monotonic() - begin


def records_of(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    lines = file.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [record for record in records_of(folder) if "step" in record]


def losses_of(folder: Path) -> list[float]:
    return [record["loss"] for record in steps_of(folder)]


def negatives_of(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "negatives").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def audit(folder: Path) -> None:
    """Every step once, every question once an epoch, every negative there once and from its snapshot."""
    config = load_config(folder / "config.yaml")
    train = config.train
    table = open_rationale_table(folder / "data" / "train.arrow")
    ids = table.column("id").to_pylist()
    order = DataOrder(table.num_rows, train.batch_size, train.seed)
    steps = steps_of(folder)
    assert [record["step"] for record in steps] == list(range(train.max_steps))
    epochs: dict[int, Counter[int]] = {}
    for record in steps:
        epochs.setdefault(record["epoch"], Counter()).update(record["rows"])
    for epoch, seen in epochs.items():
        assert max(seen.values()) == 1, f"a question was seen twice in epoch {epoch}"
        if epoch < max(epochs):
            assert set(seen) == set(range(table.num_rows)), f"a question was missed in epoch {epoch}"
    if config.sampled_negatives:
        rows = negatives_of(folder)
        for row in rows:
            assert row["iteration"] == row["step"] // train.iteration_steps
            assert row["snapshot"] == max(0, row["iteration"] - config.negatives.lag)
        expected = Counter(
            (step, ids[index], k)
            for step in range(train.max_steps)
            for index in order.batch(step)
            for k in range(config.sampled_negatives)
        )
        assert Counter((row["step"], row["id"], row["negative_index"]) for row in rows) == expected
    leftovers = [p.name for p in folder.rglob(".*") if p.name.endswith((".tmp", ".old"))]
    assert not leftovers, leftovers
