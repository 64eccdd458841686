"""What figures are drawn from: long curves made short, densities of scores, intervals of accuracies. Arrays only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

BUCKETS = 240
LEAST_BANDWIDTH = 0.015


@dataclass(frozen=True)
class Curve:
    """A curve in buckets of steps, [n] each: the mean to draw, and what a mean would hide.

    Attributes:
        x: the last step of each bucket.
        low, high: the smallest and the largest value in it.
        last: the value at its last step.
    """

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    last: np.ndarray

    @property
    def is_exact(self) -> bool:
        """Whether every point is one value."""
        return bool(np.array_equal(self.low, self.high))


def downsample(x: np.ndarray, y: np.ndarray, buckets: int = BUCKETS) -> Curve | None:
    """A curve of at most `buckets` points; None where no value is finite.

    Args:
        x: [n] float, ascending.
        y: [n] float; what is not finite is left out.
    """
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if not len(x):
        return None
    count = min(buckets, len(x))
    starts = (np.arange(count) * len(x)) // count
    ends = np.append(starts[1:], len(x)) - 1
    return Curve(
        x=x[ends],
        mean=np.add.reduceat(y, starts) / (ends - starts + 1),
        low=np.minimum.reduceat(y, starts),
        high=np.maximum.reduceat(y, starts),
        last=y[ends],
    )


def density(scores: np.ndarray, points: int = 200) -> tuple[np.ndarray, np.ndarray] | None:
    """Density of scores in [0, 1] by a Gaussian kernel, mirrored at both ends so that it integrates to 1 in between.

    The bandwidth is Silverman's, but never below `LEAST_BANDWIDTH`: scores that are all equal have a density too.

    Returns:
        Scores [points] and densities [points]; None without a finite score.
    """
    scores = scores[np.isfinite(scores)]
    if not len(scores):
        return None
    spread = float(scores.std())
    quarter = float(np.subtract(*np.percentile(scores, [75, 25]))) / 1.34
    width = max(LEAST_BANDWIDTH, 0.9 * min(spread, quarter or spread) * len(scores) ** -0.2)
    at = np.linspace(0.0, 1.0, points)
    mirrored = np.concatenate([scores, -scores, 2.0 - scores])
    kernels = np.exp(-0.5 * ((at[:, None] - mirrored[None, :]) / width) ** 2)
    return at, kernels.sum(axis=1) / (len(scores) * width * math.sqrt(2 * math.pi))


def interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n questions."""
    if n <= 0:
        return math.nan, math.nan
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)
