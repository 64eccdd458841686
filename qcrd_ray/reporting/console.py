"""Standard error, for a person: in a terminal, or in the log of a submitted job."""

from __future__ import annotations

import sys

from rich.console import Console

LOG_COLUMNS = 120


def standard_error() -> Console:
    """A console that writes to standard error. A log has no width that rich could find: 80 would break most lines."""
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else LOG_COLUMNS)
