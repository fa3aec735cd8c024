"""Drift: whether lengths have changed enough, and new limits would gain enough, to change.

Two questions, both of which must be answered with yes. Have the lengths changed since the
limits in force were found (Kolmogorov and Smirnov's test, on decayed weights), or are twice as
many known? The short ones finish first, so the lengths known at first are not typical. And would
the limits that are best now save a worthwhile share of what is reserved? The second alone would
follow noise; the first alone would change limits for nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAST_GAIN = 0.03  # in utilisation over time, on the lengths seen
CRITICAL = 1.628  # of the test at 1 %: times sqrt(1/n + 1/m)


class Drift(NamedTuple):
    """How far two distributions lie apart, and how far chance would set them."""

    distance: float
    chance: float

    @property
    def found(self) -> bool:
        """Whether chance does not explain it."""
        return self.distance > self.chance


def drift_between(before: NDArray[np.float64], now: NDArray[np.float64]) -> Drift:
    """Return the drift between two histograms with the same bins; weights are completions.

    >>> drift_between(np.array([100.0, 0.0]), np.array([0.0, 100.0])).found
    True
    """
    n, m = float(before.sum()), float(now.sum())
    if n == 0 or m == 0:
        return Drift(1.0, 0.0) if n != m else Drift(0.0, 0.0)
    apart = np.abs(np.cumsum(before) / n - np.cumsum(now) / m)
    return Drift(float(apart.max()), CRITICAL * math.sqrt(1 / n + 1 / m))


def has_news(before: NDArray[np.float64] | None, now: NDArray[np.float64]) -> bool:
    """Whether a histogram tells more than `before`, on which the limits were found."""
    if before is None or now.sum() >= 2 * before.sum():
        return True
    return drift_between(before, now).found


def is_worth_it(gain: float) -> bool:
    """Whether a gain in utilisation is worth other limits (hysteresis)."""
    return gain >= LEAST_GAIN
