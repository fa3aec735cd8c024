"""Policies: four named records, and what may be changed in one.

A policy is data. What its fields mean is decided in C, under the arena's lock; here are
only the values.
"""

from __future__ import annotations

from odma_service._native import PolicyRecord
from odma_service.errors import InvalidError
from odma_service.values import Overflow, Start

__all__ = ["NAMES", "PolicyRecord", "longest_tokens", "named"]

NAMES = ("static", "s3", "odma", "elastic")

STEP_TOKENS = 16  # where no limit is large enough
S3_BUCKETS = 10
ODMA_BUCKETS = 12  # limits at first; recalibration finds better ones
LEAST_LIMIT_TOKENS = 128


def named(
    name: str, model_length_tokens: int, capacity_tokens: int, *, slides: bool = True
) -> PolicyRecord:
    """Return the record called `name` for requests and a pool of such lengths.

    `slides`: any region may move, on one ordered stream. Where that is not so, `elastic`
    keeps back more and grows by more. Its numbers and those of `odma` are what `odma tune`
    found on training loads (a test holds the two together).

    The last limit, where there are any, holds the longest request. Copies of one batch are
    bounded by the capacity only: sliding all of a 24 GB pool takes about one decode step.
    Raises InvalidError for another name.

    >>> named("s3", 16384, 111_000).limits_tokens[:4]
    (1639, 3277, 4916, 6554)
    """
    longest = longest_tokens(model_length_tokens, capacity_tokens)
    if name == "static":
        return PolicyRecord(
            name, Start.MAXIMUM, Overflow.PREEMPT, STEP_TOKENS, max_copy_tokens=capacity_tokens
        )
    if name == "s3":
        return PolicyRecord(
            name,
            Start.QUANTILE,
            Overflow.PREEMPT,
            STEP_TOKENS,
            limits_tokens=equal_limits(longest, S3_BUCKETS),
            overflow_risk=0.5,
            growth=2.0,
            max_copy_tokens=capacity_tokens,
        )
    if name == "odma":
        return PolicyRecord(
            name,
            Start.QUANTILE,
            Overflow.RELOCATE,
            STEP_TOKENS,
            limits_tokens=rising_limits(longest, ODMA_BUCKETS),
            overflow_risk=0.7,
            safety_share=0.2,
            unsure_ratio=8.0,
            growth=1.1,
            max_copy_tokens=capacity_tokens,
        )
    if name == "elastic":
        return PolicyRecord(
            name,
            Start.STEP,
            Overflow.COMPACT,
            80 if slides else 48,
            safety_share=0.05 if slides else 0.15,
            growth=1.0 if slides else 1.05,
            max_copy_tokens=capacity_tokens,
        )
    raise InvalidError("name", f"one of {', '.join(NAMES)}, not {name!r}")


def longest_tokens(model_length_tokens: int, capacity_tokens: int) -> int:
    """Return the longest total that a request can reach."""
    return min(model_length_tokens, capacity_tokens)


def equal_limits(longest: int, count: int) -> tuple[int, ...]:
    """Return `count` limits at equal distances, the last of `longest` tokens."""
    return tuple(sorted({-(-longest * i // count) for i in range(1, count + 1)}))


def rising_limits(longest: int, count: int) -> tuple[int, ...]:
    """Return `count` limits in equal ratios, from 128 to `longest` tokens.

    >>> rising_limits(16384, 8)
    (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    """
    ratio = max(longest / LEAST_LIMIT_TOKENS, 1.0)
    last = max(count - 1, 1)
    return tuple(sorted({round(longest * ratio ** (-i / last)) for i in range(count)}))
