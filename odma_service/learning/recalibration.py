"""Recalibration: the bucket limits that would have wasted least on the lengths seen.

The lengths are the decayed histogram of total tokens. A request that stopped at its limit
would have gone on, and so will one that still runs: its weight is spread over the longer ones
(survival.py). Without the running ones the first to finish, the short ones, would seem to be all
there is. What is left after the longest finished request ends at the longest length there can be.

A token wasted beside a long request is wasted for longer. So lengths count by the time their
requests stay, which is taken to be proportional to the length itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from odma_service._native import LEARNT_ENOUGH, MOST_LIMITS, optimal_limits
from odma_service.errors import InvalidError, NothingLearntError
from odma_service.learning.survival import kaplan_meier
from odma_service.pool.policy import longest_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from odma_service._native import Histogram, PolicyRecord
    from odma_service.pool import Pool
    from odma_service.values import Caller


class LimitsReport(NamedTuple):
    """What bucket limits cost on the lengths seen.

    waste_tokens is the mean reserved beyond a request's total; utilisation the sum of
    totals over the sum of reserved tokens.
    """

    limits_tokens: tuple[int, ...]
    waste_tokens: float
    utilisation: float


class RecalibrationReport(NamedTuple):
    """Limits before and after. installed: `after` is in force. completions: their weight."""

    before: LimitsReport
    after: LimitsReport
    installed: bool
    policy_version: int
    completions: float


class Lengths(NamedTuple):
    """Weights of total lengths: weights[i] requests of upper_tokens[i] tokens."""

    upper_tokens: NDArray[np.uint32]
    weights: NDArray[np.float64]


def recalibrate(
    pool: Pool,
    *,
    dry_run: bool,
    expected_version: int | None,
    limits: int,
    caller: Caller | None = None,
) -> RecalibrationReport:
    """Compute the best limits, as many as asked (0: as many as there are); install them.

    Raises NothingLearntError without buckets or with fewer than 32 completions,
    VersionError, InvalidError for more than 16 limits.
    """
    if not 0 <= limits <= MOST_LIMITS:
        raise InvalidError("limits", f"0 to {MOST_LIMITS}, not {limits}")
    pool.check_version(expected_version)
    policy, histogram = pool.policy(), pool.histogram()
    if not policy.limits_tokens:
        raise NothingLearntError(f"the policy {policy.name!r} has no buckets")
    if histogram.completions < LEARNT_ENOUGH:
        raise NothingLearntError(
            f"{histogram.completions} completions are known, {LEARNT_ENOUGH} are needed"
        )
    lengths = _lengths(pool, histogram)
    staying = lengths_staying(lengths)
    found, _ = optimal_limits(
        staying.weights, staying.upper_tokens, limits or len(policy.limits_tokens)
    )
    version = policy.version
    if not dry_run and found != policy.limits_tokens:
        version = pool.set_policy(policy.with_changes(limits_tokens=found), version, caller)
    return RecalibrationReport(
        before=limits_report(policy, staying),
        after=limits_report(policy.with_changes(limits_tokens=found), staying),
        installed=not dry_run,
        policy_version=version,
        completions=float(lengths.weights.sum()),
    )


def seen_weights(pool: Pool) -> NDArray[np.float64]:
    """Return the weights of the total lengths seen so far, which always have the same bins."""
    return _lengths(pool, pool.histogram()).weights


def _lengths(pool: Pool, histogram: Histogram) -> Lengths:
    longest = longest_tokens(pool.spec.model_length_tokens, pool.spec.capacity_tokens)
    upper = pool.bins()
    entries = pool.regions(room=pool.most_entries)
    running = [entry.used_tokens for entry in entries if entry.live]
    bins = np.searchsorted(upper, np.array(running, np.int64)).clip(max=len(upper) - 1)
    censored = histogram.total_censored + np.bincount(bins, minlength=len(upper))
    return lengths_seen(upper, histogram._replace(total_censored=censored), longest)


def lengths_seen(upper_tokens: NDArray[np.uint32], histogram: Histogram, longest: int) -> Lengths:
    """Return the lengths of a histogram, none above `longest`, which is the last of them."""
    finished, censored = histogram.total_finished, histogram.total_censored
    weights = kaplan_meier(finished, censored)
    below = int(np.searchsorted(upper_tokens, longest))
    return Lengths(
        np.append(upper_tokens[:below], np.uint32(longest)),
        np.append(weights[:below], weights[below:].sum()),
    )


def lengths_staying(lengths: Lengths) -> Lengths:
    """Return the lengths that are in memory at some moment."""
    return Lengths(lengths.upper_tokens, lengths.weights * lengths.upper_tokens)


def limits_report(policy: PolicyRecord, lengths: Lengths) -> LimitsReport:
    """Return what the policy's limits cost, multiples of its step where none is enough."""
    upper = lengths.upper_tokens.astype(np.int64)
    steps = -(-upper // policy.step_tokens) * policy.step_tokens
    limits = np.array(policy.limits_tokens, np.int64)
    index = np.searchsorted(limits, upper)
    reserved = np.where(index < len(limits), np.append(limits, 0)[index], steps)
    reserved = np.minimum(reserved, upper[-1])
    asked, given = float(lengths.weights @ upper), float(lengths.weights @ reserved)
    weight = float(lengths.weights.sum())
    return LimitsReport(policy.limits_tokens, (given - asked) / weight, asked / given)
