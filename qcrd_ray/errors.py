"""The one error that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Input, config or environment that a user can mend.

    The message is one line: what is wrong, where, what was expected, what to do. A job prints it to standard
    error and exits with code 2, without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
