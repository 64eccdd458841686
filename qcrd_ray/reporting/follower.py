"""Follows what a run writes, so that displays and trackers cost training nothing and read what a resume would."""

from __future__ import annotations

import json
import threading
import zlib
from array import array
from collections.abc import Sequence
from typing import Any, Protocol, Self

from qcrd_ray.errors import UserError
from qcrd_ray.run_folder import EVALUATIONS_SUMMARY, METRICS, RunFolder

POLL_SECONDS, REMOTE_POLL_SECONDS = 0.5, 5.0


class Listener(Protocol):
    """What is told of a run's steps and evaluations, in one thread."""

    def record(self, record: dict[str, Any], before: bool) -> None:
        """A line of `metrics.jsonl`.

        Args:
            before: it was there when the follower began. A step that is done again after a resume comes again.
        """
        ...

    def evaluation(self, entry: dict[str, Any], before: bool) -> None:
        """An accuracy, {"step", "snapshot", "split", "accuracy", "n"}, once, and after the records of its step."""
        ...


class Follower:
    """Reads `metrics.jsonl` and the evaluations in a thread, from `start` to the end of the block."""

    def __init__(self, run: RunFolder, listeners: Sequence[Listener]) -> None:
        self.run = run
        self.listeners = listeners
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)
        self._lines = array("I")
        self._last = b""
        self._position = 0
        self._done = 0
        self._evaluated: set[tuple[int, str]] = set()

    def start(self) -> None:
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=2 * REMOTE_POLL_SECONDS)

    def _follow(self) -> None:
        before = True
        while True:
            ended = self._ended.is_set()
            try:
                self._read_metrics(before)
                self._read_evaluations(before, ended)
                before = False
            except (UserError, OSError, ValueError):
                pass  # who works with the storage says what is wrong with it; a file may be under way
            if ended:
                return
            self._ended.wait(POLL_SECONDS if self.run.root is not None else REMOTE_POLL_SECONDS)

    def _read_metrics(self, before: bool) -> None:
        # One line more than is new: where it is another one, the file was written anew by a resume.
        start = self._position - len(self._last)
        data = self._read(start)
        skip = 0
        if data.startswith(self._last):
            lines = data[len(self._last) :].splitlines(keepends=True)
        else:
            lines = self._read(0).splitlines(keepends=True)
            while skip < min(len(lines), len(self._lines)) and zlib.crc32(lines[skip]) == self._lines[skip]:
                skip += 1
            self._position = sum(map(len, lines[:skip]))
            self._last = lines[skip - 1] if skip else b""
            del self._lines[skip:]
        for line in lines[skip:]:
            if not line.endswith(b"\n"):
                break
            record = json.loads(line)
            self._position += len(line)
            self._last = line
            self._lines.append(zlib.crc32(line))
            self._done = max(self._done, record.get("step", -1) + 1)
            for listener in self.listeners:
                listener.record(record, before)

    def _read(self, start: int) -> bytes:
        try:
            if self.run.root is None:  # a bucket refuses to begin behind a file's end
                return self.run.read(METRICS)[start:]
            return self.run.read(METRICS, start)
        except FileNotFoundError:
            return b""

    def _read_evaluations(self, before: bool, ended: bool) -> None:
        for entry in self.run.read_json(EVALUATIONS_SUMMARY) or []:
            key = entry["step"], entry["split"]
            # On a bucket the metrics lag behind the evaluations.
            if key not in self._evaluated and (entry["step"] <= self._done or ended):
                self._evaluated.add(key)
                for listener in self.listeners:
                    listener.evaluation(entry, before)
