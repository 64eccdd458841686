"""Jobs in the process of the test: bad input is found before anything is started, and a process takes seconds."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def script(path: str) -> ModuleType:
    """A script's functions, without what it does as a command.

    Args:
        path: from the root of the project.
    """
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_script", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def process_as_before() -> Iterator[None]:
    """Undoes what a job does to its process: SIGTERM's handler, and standard output that goes to standard error."""
    handler, output = signal.getsignal(signal.SIGTERM), os.dup(1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(output, 1)
        os.close(output)
        signal.signal(signal.SIGTERM, handler)


def refused(capfd: pytest.CaptureFixture[str], job: Callable[[], int]) -> str:
    """The one line that a job ends with whose input is bad. Its code is 2, and it gives no result."""
    capfd.readouterr()
    with process_as_before():
        code = job()
    out, err = capfd.readouterr()
    assert (code, out) == (2, ""), err[-2000:]
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last
