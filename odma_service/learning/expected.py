"""Expected cost: what limits and a risk would have cost on the requests seen, errors included.

A region is reserved before the length is known: at the quantile of its prediction that the
accepted risk picks, rounded up to a limit. Where the answer is shorter, room is wasted for as
long as the request stays; where it is longer, the region goes through the limits above one by
one, and is copied at each. Both are counted in token-steps, a token of memory for one decode
step. So limits and risk follow from how good predictions are, whatever makes them.

A request that waits at level w of its region (what is written, or where it starts if that is
more) needs a limit of at least w in that step. So the steps that all requests spend at each
level take the place of lengths, and those that pass a limit pay its toll: limits.c does the rest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from odma_service._native import optimal_limits
from odma_service.learning.survival import kaplan_meier
from odma_service.pool.policy import longest_tokens
from odma_service.values import QUANTILE_LEVELS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from odma_service._native import PolicyRecord
    from odma_service.pool import Pool

    Floats = NDArray[np.float64]

RISKS = (0.1, 0.3, 0.5, 0.7, 0.9)
OVERFLOW_TOKEN_STEPS = 10.0
"""Cost of an overflow for each token of the region. Copying a token takes as long as reading
two, and memory that a token wastes for a step costs 0.7 of its share of that step: together 0.9
token-steps for the model and card of the design. The rest is the chance that no hole is long
enough, and somebody is preempted. From 3 to 30 it makes no difference (docs/decisions/0008)."""


class Cheapest(NamedTuple):
    """A policy with other limits and another risk.

    gain: the share of the reserved memory that it would write to in addition, with the cost of
    overflows counted as reserved.
    """

    policy: PolicyRecord
    gain: float


class Seen(NamedTuple):
    """Requests that ended or run: tokens, weights that sum to their number, and predictions.

    weights      each censored request is spread over the longer outputs (survival.py)
    quantiles    of output tokens, one row of QUANTILE_LEVELS each
    """

    prompts: Floats
    totals: Floats
    weights: Floats
    quantiles: Floats


class Levels(NamedTuple):
    """The costs that limits are chosen by, for one risk, at the bins of the histograms.

    steps[i]  token-steps that need a limit of upper_tokens[i] or more
    tolls[i]  the cost of a limit there for the requests that outgrow it
    written   token-steps that are written to
    """

    upper_tokens: NDArray[np.uint32]
    steps: Floats
    tolls: Floats
    written: float


def cheapest(pool: Pool) -> Cheapest | None:
    """Return the policy in force with the limits and the risk that would have cost least.

    As many limits as it has, and any of RISKS if its own is one of them: another was
    somebody's decision. None while nothing can be predicted.
    """
    policy = pool.policy()
    longest = longest_tokens(pool.spec.model_length_tokens, pool.spec.capacity_tokens)
    seen = seen_requests(pool, longest)
    if seen is None:
        return None
    bins = pool.bins()
    upper = np.append(bins[bins < longest], np.uint32(longest))
    levels = {risk: levels_at(risk, seen, upper) for risk in {*RISKS, policy.overflow_risk}}
    before = cost_of(policy, levels[policy.overflow_risk])
    choices = []
    for risk in RISKS if policy.overflow_risk in RISKS else (policy.overflow_risk,):
        at = levels[risk]
        limits, _ = optimal_limits(at.steps, upper, len(policy.limits_tokens), at.tolls)
        changed = replace(policy, limits_tokens=limits, overflow_risk=risk)
        choices.append((cost_of(changed, at), changed))
    cost, changed = min(choices, key=lambda choice: choice[0])
    written = levels[policy.overflow_risk].written
    return Cheapest(changed, written / cost - written / before)


def seen_requests(pool: Pool, longest: int) -> Seen | None:
    """Return the last completions and all that runs, none above `longest` tokens.

    A request without a prediction gets today's. None while nothing can be predicted today.
    """
    today = pool.quantiles("")
    if today is None:
        return None
    ended = pool.completions()
    running = [entry for entry in pool.regions(room=pool.most_entries) if entry.live]
    prompts = [each.prompt_tokens for each in ended] + [each.prompt_tokens for each in running]
    outputs = [each.output_tokens for each in ended]
    outputs += [max(each.used_tokens - each.prompt_tokens, 1) for each in running]
    censored = [each.censored for each in ended] + [True] * len(running)
    quantiles = [each.quantiles or today for each in ended] + [today] * len(running)
    prompts_tokens = np.array(prompts, np.float64)
    totals = np.minimum(prompts_tokens + outputs, longest)
    weights = _weights(np.array(outputs, np.float64), np.array(censored))
    return Seen(prompts_tokens, totals, weights, np.array(quantiles, np.float64))


def levels_at(risk: float, seen: Seen, upper_tokens: NDArray[np.uint32]) -> Levels:
    """Return the levels where requests start at the quantile that `risk` exceeds."""
    longest = float(upper_tokens[-1])
    prompts, totals, weights, _ = seen
    starts = prompts + output_at(risk, seen.quantiles, longest - prompts)
    starts = np.clip(starts, prompts + 1, longest)
    left = np.minimum(starts, totals)  # from where a token takes it one level up
    upper = upper_tokens.astype(np.float64)
    begun, begun_tokens = _below(left, weights, upper)
    ended, ended_tokens = _below(totals, weights, upper)
    climbed = (upper * begun - begun_tokens) - (upper * ended - ended_tokens)
    steps = np.diff(climbed, prepend=0.0)
    waits = np.searchsorted(upper, starts).clip(max=len(upper) - 1)
    steps += np.bincount(waits, weights * (left - prompts), len(upper))
    tolls = np.clip(begun - ended, 0, None) * upper * OVERFLOW_TOKEN_STEPS
    written = float(weights @ (totals**2 - prompts**2)) / 2
    return Levels(upper_tokens, np.clip(steps, 0, None), tolls, written)


def cost_of(policy: PolicyRecord, levels: Levels) -> float:
    """Return the token-steps reserved under a policy's limits, with the tolls at them."""
    upper = levels.upper_tokens.astype(np.int64)
    ends = np.append(np.array(policy.limits_tokens, np.int64), upper[-1])
    index = np.searchsorted(ends[:-1], upper)
    above = -(-upper // policy.step_tokens) * policy.step_tokens
    reserved = np.where(index < len(ends) - 1, ends[index], above).clip(max=upper[-1])
    passed = np.searchsorted(upper, ends[ends < upper[-1]])
    return float(levels.steps @ reserved + levels.tolls[passed].sum())


def output_at(risk: float, quantiles: Floats, most: Floats) -> Floats:
    """Return output tokens that are exceeded with probability `risk`, as policy.c does it.

    >>> output_at(0.5, np.array([[1.0, 2, 4, 8, 16, 32, 64]]), np.array([100.0]))
    array([4.])
    """
    level = 1 - risk
    known = np.log1p(np.column_stack([quantiles, np.maximum(most, quantiles[:, -1])]))
    levels = (*QUANTILE_LEVELS, 1.0)
    after = int(np.searchsorted(levels, level))
    if after == 0:
        return np.asarray(quantiles[:, 0])
    part = (level - levels[after - 1]) / (levels[after] - levels[after - 1])
    found = np.expm1(known[:, after - 1] * (1 - part) + known[:, after] * part)
    return np.asarray(np.round(found, 6))  # a whole number again where it was one


def _weights(outputs: Floats, censored: NDArray[np.bool_]) -> Floats:
    """Return the share of each times their number; at one length the censored end last."""
    order = np.lexsort((censored, outputs))
    weights, stopped = np.empty(len(order)), censored[order].astype(np.float64)
    weights[order] = kaplan_meier(1 - stopped, stopped)
    return weights


def _below(values: Floats, weights: Floats, at: Floats) -> tuple[Floats, Floats]:
    """Return the sums of weight and of weight x value of the values up to each of `at`."""
    order = np.argsort(values)
    count = np.searchsorted(values[order], at, side="right")
    sums = (np.concatenate([[0.0], np.cumsum(each[order])]) for each in (weights, weights * values))
    weight, moment = (each[count] for each in sums)
    return weight, moment
