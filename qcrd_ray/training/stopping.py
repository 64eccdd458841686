"""How a run is asked to end before its last step: by a signal to its driver, or by whoever has called `train`."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray

POLL_SECONDS = 0.2


class Stop:
    """Asks a training run to end. Any thread may ask.

    While steps are trained, the run ends after the step at hand, with a checkpoint. At any other time a signal ends it
    at once. Who asks from a thread waits for what cannot be left half done: a live teacher's questions at hand, the
    tables, what the workers start from; while the run waits for resources, samplers or evaluations it ends at once.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._orderly = False
        self.signal: int | None = None
        """The signal that asked, None where none did."""

    def ask(self) -> None:
        """Ask the run to end. `train` then raises `Stopped`."""
        self._asked.set()

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def check(self) -> None:
        """Raise KeyboardInterrupt, as a signal does, if the run was asked to end."""
        if self.asked:
            raise KeyboardInterrupt

    def get(self, reference: Any) -> Any:
        """`ray.get` of one reference. Raises KeyboardInterrupt if the run is asked to end."""
        self.wait([reference])
        return ray.get(reference)

    def wait(self, references: Sequence[Any], seconds: float = math.inf) -> list[Any]:
        """Those of the references that are not ready after `seconds`. Raises KeyboardInterrupt as `get` does."""
        end = time.monotonic() + seconds
        pending = list(references)
        while pending and time.monotonic() < end:
            self.check()
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_SECONDS)
        return pending

    @contextmanager
    def orderly(self) -> Iterator[None]:
        """A first signal inside does nothing but ask: whoever is inside looks at `asked`, and ends in good order."""
        self._orderly = True
        try:
            yield
        finally:
            self._orderly = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Have SIGTERM and SIGINT ask. Outside of `orderly`, and from the second one on, they interrupt too.

        Python hands signals to the main thread only: in another one this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.signal is not None
        self.signal = number
        self.ask()
        if again or not self._orderly:
            raise KeyboardInterrupt
