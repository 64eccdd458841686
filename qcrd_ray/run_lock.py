"""One driver a run: who has it says so in `owner.json`, and whoever lost it writes nothing more.

A driver of this machine that is gone is known at once; that of another machine by its heartbeat, which stops.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from typing import Any, Self

from qcrd_ray.errors import UserError
from qcrd_ray.run_folder import RunFolder, is_running

OWNER, ATTEMPT = "owner.json", "attempt.json"
BEAT_SECONDS = 10.0
SILENCE_SECONDS = 3 * BEAT_SECONDS


class LostRun(RuntimeError):
    """Another driver has taken the run over."""


class RunLock:
    """Holds a run for as long as the block lasts. Its `token` goes to everything that writes into the run."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.token = uuid.uuid4().hex
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        """Raises UserError where a living driver has the run."""
        self._await_the_former_owner()
        self._write(0)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(timeout=BEAT_SECONDS)
        try:
            if owns(self.run, self.token):
                self.run.remove(ATTEMPT)
                self.run.remove(OWNER)
        except UserError:
            pass  # the storage is gone, which whoever works with it has said

    def _await_the_former_owner(self) -> None:
        owner = _owner(self.run)
        end = time.monotonic() + SILENCE_SECONDS
        while owner is not None and not _is_gone(owner):
            here = owner.get("machine") == _machine()
            if not here and time.monotonic() < end:
                time.sleep(1.0)
                now = _owner(self.run)
                if now is None or (now.get("token"), now.get("beat")) == (owner.get("token"), owner.get("beat")):
                    owner = now
                    continue
                owner = now
                here = True
            if not here:
                return  # no beat for as long as a living driver never takes
            raise UserError(
                f"run {self.run} is being trained by process {owner.get('process')} of {owner.get('host')}; wait for "
                "it, end it, or choose another name"
            )

    def _beat(self) -> None:
        number = 0
        while not self._end.wait(BEAT_SECONDS):
            number += 1
            try:
                if not owns(self.run, self.token):
                    return
                self._write(number)
            except UserError:
                continue

    def _write(self, beat: int) -> None:
        record = {
            "token": self.token,
            "host": socket.gethostname(),
            "machine": _machine(),
            "process": os.getpid(),
            "started": _start_time(os.getpid()),
            "beat": beat,
        }
        self.run.write(OWNER, json.dumps(record) + "\n")


def owns(run: RunFolder, token: str) -> bool:
    """Whether the driver with this token has the run."""
    owner = _owner(run)
    return owner is not None and owner.get("token") == token


def check_owner(run: RunFolder, token: str) -> None:
    """Raise LostRun where another driver has taken the run over."""
    if not owns(run, token):
        raise LostRun(f"another driver has taken over run {run}; this process writes nothing more")


def begin_attempt(run: RunFolder, token: str, number: int) -> None:
    """The driver's training workers start (again): those of an earlier attempt write nothing more."""
    check_owner(run, token)
    run.write(ATTEMPT, json.dumps({"token": token, "number": number}) + "\n")


def check_attempt(run: RunFolder, token: str, number: int) -> None:
    """Raise LostRun where other training workers have taken over, as after a node that was only cut off."""
    if run.read_json(ATTEMPT) != {"token": token, "number": number}:
        raise LostRun(f"other training workers have taken over run {run}; this process writes nothing more")


def _owner(run: RunFolder) -> dict[str, Any] | None:
    try:
        owner = run.read_json(OWNER)
    except ValueError:
        return None
    return owner if isinstance(owner, dict) else None


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine and is no more."""
    if owner.get("machine") != _machine():
        return False
    process = owner.get("process")
    return not isinstance(process, int) or not is_running(process) or _start_time(process) != owner.get("started")


def _machine() -> str:
    """The host and its boot: process numbers of another boot, or of another container, say nothing here."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        boot += os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def _start_time(process: int) -> str | None:
    """When a process of this machine was started, in the kernel's ticks; None where that is not to be had."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
