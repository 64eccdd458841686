"""The limits of an endpoint, on a clock that a test sets."""

from __future__ import annotations

import math
import random
from email.utils import formatdate
from itertools import pairwise
from typing import Any

import pytest

from qcrd_ray.sampling.rate_limit import RateLimit, retry_after
from tests.sampling.faulty_proxy import most_in_a_window


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_requests_are_spaced_evenly_and_no_window_has_more() -> None:
    clock = Clock()
    limit = RateLimit(requests_per_minute=120, clock=clock)
    times = []
    while clock.now < 1200:
        if limit.delay(1) == 0.0:
            limit.take(1)
            times.append(clock.now)
        clock.now += 0.01 if len(times) % 50 else 3.0
    for seconds in (2, 5, 60):
        assert most_in_a_window(times, seconds + 0.001) <= 2 * seconds
    assert len(times) > 200
    assert min(b - a for a, b in pairwise(times)) > 0.5


def test_no_minute_has_more_tokens_than_the_limit() -> None:
    generator, clock = random.Random(0), Clock()
    limit = RateLimit(tokens_per_minute=1000, clock=clock)
    under_way: list[tuple[float, Any, float]] = []
    requests: list[tuple[float, float, float]] = []
    for _ in range(40_000):
        clock.now += 0.05
        for end, taken, actual in list(under_way):
            if end <= clock.now:
                limit.settle(taken, actual)
                under_way.remove((end, taken, actual))
        estimate = generator.uniform(50, 200)
        if limit.delay(estimate) == 0.0:
            actual, end = estimate * generator.uniform(0.1, 1.0), clock.now + generator.uniform(0.5, 8.0)
            under_way.append((end, limit.take(estimate), actual))
            requests.append((clock.now, end, actual))
    for place in (0, 1):
        for moment in [request[place] for request in requests]:
            assert sum(actual for *when, actual in requests if moment <= when[place] < moment + 60.0) <= 1000
    assert sum(actual for *_, actual in requests) > 0.6 * 1000 * 40_000 * 0.05 / 60


def test_a_request_larger_than_the_limit_goes_alone() -> None:
    clock = Clock()
    limit = RateLimit(tokens_per_minute=100, clock=clock)
    small = limit.take(10)
    assert limit.delay(500) == math.inf
    limit.settle(small, 5)
    assert limit.delay(500) == 60.0
    clock.now += 60.0
    assert limit.delay(500) == 0.0
    large = limit.take(500)
    assert limit.delay(1) == math.inf
    limit.settle(large, 0)
    assert limit.delay(100) == 0.0


def test_a_hold_holds_everything_back() -> None:
    clock = Clock()
    limit = RateLimit(clock=clock)
    limit.hold(5.0)
    limit.hold(2.0)
    assert limit.delay(1) == 5.0
    clock.now += 5.0
    assert limit.delay(1) == 0.0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after-ms": "1500", "retry-after": "7"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
        ({"retry-after": formatdate(1_000_090, usegmt=True)}, 90.0),
        ({"retry-after": formatdate(999_000, usegmt=True)}, 0.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "tomorrow"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, now=1_000_000.0) == seconds
