"""The errors that a user is meant to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class UserError(Exception):
    """Input, config or environment that a user can mend.

    The message is one line: what is wrong, where, what was expected, what to do. A job prints it to standard
    error and exits with code 2, without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class TooManyFailures(Exception):
    """A job that did what it could, with more failures than the config allows. It has a result and exit code 1."""

    def __init__(self, message: str, result: Mapping[str, Any]) -> None:
        super().__init__(" ".join(message.split()))
        self.result = result
