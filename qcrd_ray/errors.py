"""The errors that a user is meant to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ESCAPED = {
    code: f"\\u{code:04x}"
    for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def printable(text: str) -> str:
    """One line of valid Unicode: white space is a blank, what a terminal acts on or nothing can encode an escape."""
    return " ".join(text.split()).translate(_ESCAPED).encode("utf-8", "backslashreplace").decode("utf-8")


class UserError(Exception):
    """Input, config or environment that a user can mend.

    The message is one line: what is wrong, where, what was expected, what to do. A job prints it to standard
    error and exits with code 2, without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class TooManyFailures(Exception):
    """A job that did what it could, with more failures than the config allows. It has a result and exit code 1."""

    def __init__(self, message: str, result: Mapping[str, Any]) -> None:
        super().__init__(printable(message))
        self.result = result


class Stopped(Exception):
    """A run that was asked to end before its last step, or a sweep before its last trial. The same command goes on.

    Args:
        step: of the newest checkpoint, 0 without one; of a sweep, trials that are finished.
        steps: that there were to be.
        signal: number of the signal that asked, None where none did.
        unit: what is counted.
    """

    def __init__(self, step: int, steps: int, signal: int | None = None, unit: str = "step") -> None:
        message = f"stopped at {unit} {step} of {steps}; the same command goes on from there"
        if not step and unit == "step":
            message = f"stopped before the first checkpoint of {steps} steps; start it again"
        super().__init__(message)
        self.step = step
        self.steps = steps
        self.signal = signal
        self.unit = unit

    def __reduce__(self) -> tuple[type[Stopped], tuple[int, int, int | None, str]]:
        return type(self), (self.step, self.steps, self.signal, self.unit)


def find_user_error(error: BaseException) -> UserError | None:
    """The UserError in an exception or in what it wraps (Ray wraps what its tasks and workers raise)."""
    seen: set[int] = set()
    todo: list[Any] = [error]
    while todo:
        current = todo.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        cause = getattr(current, "cause", None)
        if isinstance(current, UserError) and not isinstance(cause, UserError):
            return current
        failures = getattr(current, "worker_failures", None)
        todo += [
            cause,
            current.__cause__,
            getattr(current, "controller_failure", None),
            *(failures.values() if isinstance(failures, dict) else ()),
        ]
    return None


def first_line(error: BaseException) -> str:
    """What an error says, cut to a line."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """What an error says behind the traceback that Ray puts before it."""
    return _lines(error)[-1]


def _lines(error: BaseException) -> list[str]:
    return [" ".join(line.split())[:300] for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
