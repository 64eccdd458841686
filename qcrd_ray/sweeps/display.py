"""The trials of a sweep while they run: a live table in a terminal, a line for each change elsewhere."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from typing import Any, Self

from rich.live import Live
from rich.table import Table
from rich.text import Text

from qcrd_ray.errors import UserError
from qcrd_ray.reporting.console import standard_error
from qcrd_ray.reporting.progress import clock
from qcrd_ray.run_folder import METRICS, RunFolder

POLL_SECONDS, REMOTE_POLL_SECONDS = 1.0, 10.0
SHOWN_ROWS = 24
STYLES = {"finished": "green", "failed": "red", "stopped": "yellow", "running": "cyan"}


@dataclass
class TrialState:
    """Where a trial stands, for the table."""

    status: str = "waiting"
    step: int = 0
    steps: int = 0
    accuracy: float | None = None
    tries: int = 0
    since: float = 0.0
    note: str = ""


class SweepDisplay:
    """Shows the trials of a sweep on standard error for as long as the block lasts."""

    def __init__(self, title: str, steps: int, room: int) -> None:
        """
        Args:
            steps: that a trial has.
            room: trials at once.
        """
        self.title, self.steps, self.room = title, steps, room
        self.console = standard_error()
        self.runs: dict[str, RunFolder] = {}
        self.states: dict[str, TrialState] = {}
        self.begin = time.monotonic()
        self._lock = threading.RLock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._live = Live(console=self.console, get_renderable=self._table, refresh_per_second=2, transient=False)

    def add(self, name: str, run: RunFolder, status: str = "waiting", accuracy: float | None = None) -> None:
        """A trial that is to run, or that has ended in an earlier start. One that is known stays as it is."""
        with self._lock:
            self.runs[name] = run
            step = self.steps if status == "finished" else 0
            note = "" if status == "waiting" else "in an earlier start"
            self.states.setdefault(name, TrialState(status, step, self.steps, accuracy, note=note))

    def __enter__(self) -> Self:
        waiting = sum(state.status == "waiting" for state in self.states.values())
        self._say(f"{self.title}: {len(self.states)} trials, {waiting} to run, {self.room} at once")
        if self.console.is_terminal:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(timeout=5)
        if self.console.is_terminal:
            self._live.stop()

    # What happens to a trial

    def started(self, name: str) -> None:
        with self._lock:
            state = self.states[name]
            state.status, state.since = "running", time.monotonic()
            state.tries += 1
            again = f", try {state.tries}" if state.tries > 1 else ""
            self._say(f"{name}: started{again}")

    def evaluated(self, name: str, step: int, accuracy: float) -> None:
        with self._lock:
            self.states[name].accuracy = accuracy
            self.states[name].step = max(step, self.states[name].step)
            self._say(f"{name}: step {step}, accuracy {accuracy:.3f}")

    def ended(self, name: str, status: str, accuracy: float | None, note: str = "") -> None:
        with self._lock:
            state = self.states[name]
            seconds = time.monotonic() - state.since
            state.status, state.note = status, note
            state.accuracy = accuracy if accuracy is not None else state.accuracy
            state.since = seconds
            done = sum(s.status not in ("waiting", "running") for s in self.states.values())
            reached = f", accuracy {accuracy:.3f}" if accuracy is not None else ""
            reason = f": {note}" if note else ""
            self._say(f"{name}: {status}{reached} after {clock(seconds)} ({done} of {len(self.states)}){reason}")

    def _say(self, text: str) -> None:
        """A line, where no table shows the same."""
        if not self._live.is_started:
            line = Text(f"{clock(time.monotonic() - self.begin):>7}  {text}")
            self.console.print(line, soft_wrap=True)

    def _follow(self) -> None:
        """Read the runs of running trials for the step that they are at."""
        while True:
            remote = any(run.root is None for run in list(self.runs.values()))
            if self._end.wait(REMOTE_POLL_SECONDS if remote else POLL_SECONDS):
                return
            for name, state in list(self.states.items()):
                if state.status != "running":
                    continue
                step = _steps_done(self.runs[name])
                if step is not None:
                    state.step = max(state.step, step)

    def _table(self) -> Table:
        with self._lock:
            done = sum(state.status not in ("waiting", "running") for state in self.states.values())
            title = f"{self.title} · {done} of {len(self.states)} trials · {clock(time.monotonic() - self.begin)}"
            table = Table(title=Text(title), title_justify="left", expand=False)
            for column in ("trial", "status", "step", "accuracy", "time", ""):
                table.add_column(column, justify="right" if column in ("step", "accuracy", "time") else "left")
            rows = list(self.states.items())
            hidden = 0
            if len(rows) > SHOWN_ROWS:  # what runs, then what ended last
                order = {"running": 0, "failed": 1, "waiting": 3}
                rows.sort(key=lambda item: order.get(item[1].status, 2))
                hidden, rows = len(rows) - SHOWN_ROWS, rows[:SHOWN_ROWS]
            for name, state in rows:
                running = state.status == "running"
                seconds = time.monotonic() - state.since if running else state.since
                table.add_row(
                    Text(name),
                    Text(state.status, style=STYLES.get(state.status, "dim")),
                    f"{state.step}/{state.steps}" if state.step else "",
                    f"{state.accuracy:.3f}" if state.accuracy is not None else "",
                    clock(seconds) if seconds else "",
                    Text(state.note[:80]),
                )
            if hidden:
                table.caption = f"and {hidden} more"
            return table


def _steps_done(run: RunFolder) -> int | None:
    """Steps in a run's metrics, None before the first line of them."""
    try:
        if run.root is not None:
            with (run.root / METRICS).open("rb") as file:
                file.seek(0, 2)
                file.seek(max(0, file.tell() - 20_000))
                data = file.read()
        else:
            data = run.read(METRICS)
    except (UserError, OSError):
        return None
    for line in reversed(data.split(b"\n")[:-1]):
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if "step" in record:
            return int(record["step"]) + 1
    return 0 if data else None
