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
ELASTIC_STEP_TOKENS = 64
S3_BUCKETS = 10
ODMA_BUCKETS = 8  # limits at first; recalibration finds better ones


def named(
    name: str, model_length_tokens: int, capacity_tokens: int, *, one_stream: bool = True
) -> PolicyRecord:
    """Return the record called `name` for requests and a pool of such lengths.

    Without one ordered stream `elastic` cannot slide regions: it keeps back more and grows
    by more (docs/decisions/0003).

    The last limit, where there are any, holds the longest request. Copies of one batch are
    bounded by the capacity only: sliding all of a 24 GB pool takes about one decode step.
    Raises InvalidError for another name.

    >>> named("odma", 16384, 111_000).limits_tokens
    (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
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
            limits_tokens=_equal_limits(longest, S3_BUCKETS),
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
            limits_tokens=_doubling_limits(longest, ODMA_BUCKETS),
            overflow_risk=0.1,
            safety_share=0.05,
            unsure_ratio=4.0,
            growth=1.25,
            max_copy_tokens=capacity_tokens,
        )
    if name == "elastic":
        return PolicyRecord(
            name,
            Start.STEP,
            Overflow.COMPACT,
            ELASTIC_STEP_TOKENS,
            safety_share=0.03 if one_stream else 0.15,
            growth=1.0 if one_stream else 1.05,
            max_copy_tokens=capacity_tokens,
        )
    raise InvalidError("name", f"one of {', '.join(NAMES)}, not {name!r}")


def longest_tokens(model_length_tokens: int, capacity_tokens: int) -> int:
    """Return the longest total that a request can reach."""
    return min(model_length_tokens, capacity_tokens)


def _equal_limits(longest: int, count: int) -> tuple[int, ...]:
    return tuple(sorted({-(-longest * i // count) for i in range(1, count + 1)}))


def _doubling_limits(longest: int, count: int) -> tuple[int, ...]:
    return tuple(sorted({-(-longest // 2**i) for i in range(count)}))
