"""How fast an endpoint may be asked: requests and tokens a minute, and the pauses that the server asks for."""

from __future__ import annotations

import email.utils
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MINUTE = 60.0
SLACK = 1.05
"""Requests are this much further apart than the limit says: what the network delays must not crowd together."""


@dataclass(eq=False)
class Taken:
    """Tokens of one request, counted until `expires`; those of one that is under way never expire."""

    tokens: float
    expires: float = math.inf


class RateLimit:
    """Tells when the next request may go. Waits for nothing itself.

    Requests are evenly spaced. Tokens are counted from when a request goes until a minute after its answer, so that
    no minute has more than the limit, whether it is counted at the request or at the answer.

    Args:
        requests_per_minute, tokens_per_minute: None for no limit.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval = SLACK * MINUTE / requests_per_minute if requests_per_minute else 0.0
        self._tokens = tokens_per_minute or math.inf
        self._clock = clock
        self._next = -math.inf
        self._held_until = -math.inf
        self._taken: list[Taken] = []

    def delay(self, tokens: float) -> float:
        """Seconds until a request of so many tokens may go; inf where one under way has to end first."""
        now = self._clock()
        return max(0.0, self._next - now, self._held_until - now, self._until_tokens(tokens, now))

    def take(self, tokens: float) -> Taken:
        """A request goes now."""
        self._next = max(self._next, self._clock()) + self._interval
        taken = Taken(tokens)
        if self._tokens < math.inf:
            self._taken.append(taken)
        return taken

    def settle(self, taken: Taken, tokens: float) -> None:
        """A request has ended; it was so many tokens."""
        taken.tokens, taken.expires = tokens, self._clock() + MINUTE

    def hold(self, seconds: float) -> None:
        """Let nothing go for so long."""
        self._held_until = max(self._held_until, self._clock() + seconds)

    def _until_tokens(self, tokens: float, now: float) -> float:
        self._taken = [taken for taken in self._taken if taken.expires > now and taken.tokens > 0]
        used = sum(taken.tokens for taken in self._taken)
        wait = 0.0
        # One that is larger than the whole limit goes alone.
        for taken in sorted(self._taken, key=lambda taken: taken.expires):
            if used + tokens <= self._tokens:
                break
            used -= taken.tokens
            wait = taken.expires - now
        return wait


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that a server asks to wait, from `retry-after-ms` or `Retry-After` (seconds or an HTTP date).

    Args:
        headers: by lower-case name, or with names that compare without case.
        now: seconds since the epoch; the current time if None.
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    try:
        date = email.utils.parsedate_to_datetime(headers["retry-after"])
    except (KeyError, ValueError):
        return None
    return max(0.0, date.timestamp() - (time.time() if now is None else now))
