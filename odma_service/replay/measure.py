"""Measures: a run of the loop in numbers, over a window that is the same for every policy.

The window is counted in finished requests: from the tenth part of them until the moment when,
under any of the policies compared, nobody waited any more. So a policy is neither rewarded for
its start nor for the time in which it only drains. Rates, shares and latencies are the
window's; events (preemptions, copies, safety hits) are counted over the whole run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from odma_service.replay.load import Request
from odma_service.replay.loop import History
from odma_service.replay.prices import PICOSECONDS

WARM_SHARE = 0.1
LEAST_FINISHED = 20
MEMORY_BOUND_RATIO = 1.1

# Of Student's t, two-sided 95 %, by degrees of freedom from 1; above them the normal's.
# fmt: off
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)
# fmt: on
NORMAL_95 = 1.96


class Window(NamedTuple):
    """A range of requests by the order in which they finish. steady: not the whole run."""

    first: int
    last: int
    steady: bool


def window_of(histories: Iterable[History]) -> Window:
    """Return the window for runs of one load; the whole run where too few lie in it."""
    runs = list(histories)
    count = min(len(history.finished) for history in runs)
    first = math.ceil(count * WARM_SHARE)
    last = min(count if h.emptied is None else h.emptied for h in runs)
    if last - first < LEAST_FINISHED:
        return Window(0, count, steady=False)
    return Window(first, last, steady=True)


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of a latency."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Measures:
    """What one policy gave on one load."""

    tokens_per_s: float
    tokens_per_s_whole_run: float
    requests_per_s: float
    utilisation_written_over_capacity: float
    utilisation_written_over_reserved: float
    mean_running: float
    copy_share_of_time: float
    prefill_share_of_time: float
    ttft_s: Spread
    tpot_s: Spread
    preemptions: int
    recomputed_tokens: int
    swapped_tokens: int
    prompt_tokens: int
    reused_tokens: int
    copies: int
    copied_tokens: int
    steps: int
    decisions: int


def measure(
    history: History, window: Window, capacity_tokens: int, outputs: Sequence[int]
) -> Measures:
    """Return the measures of a run in a window; `outputs` are answer lengths by request."""
    sums = history.sums
    end = sums[window.last - 1]
    begin = sums[window.first - 1] if window.first else type(end)()
    total, tokens, written, reserved, copy, prefill, running = (
        b - a for a, b in zip(begin, end, strict=True)
    )
    finished = history.finished[window.first : window.last]
    ttft = [history.first_ps[i] - history.arrived_ps[i] for i in finished]
    tpot = [
        (history.finished_ps[i] - history.first_ps[i]) / (outputs[i] - 1)
        for i in finished
        if outputs[i] > 1
    ]
    seconds = total / PICOSECONDS
    return Measures(
        tokens_per_s=tokens / seconds,
        tokens_per_s_whole_run=sums[-1].tokens * PICOSECONDS / sums[-1].now_ps,
        requests_per_s=len(finished) / seconds,
        utilisation_written_over_capacity=written / total / capacity_tokens,
        utilisation_written_over_reserved=written / reserved,
        mean_running=running / total,
        copy_share_of_time=copy / total,
        prefill_share_of_time=prefill / total,
        ttft_s=_spread(ttft),
        tpot_s=_spread(tpot),
        preemptions=history.preemptions,
        recomputed_tokens=history.recomputed_tokens,
        swapped_tokens=history.swapped_tokens,
        prompt_tokens=history.prompt_tokens,
        reused_tokens=history.reused_tokens,
        copies=history.copies,
        copied_tokens=history.copied_tokens,
        steps=history.steps,
        decisions=history.decisions,
    )


@dataclass(frozen=True, slots=True)
class TenantMeasures:
    """What one tenant got: output of those finished in the window, waiting for a first token."""

    requests: int
    tokens_per_s: float
    ttft_s: Spread
    preemptions: int


def by_tenant(
    history: History, window: Window, requests: Sequence[Request]
) -> dict[str, TenantMeasures]:
    """Return the measures of each tenant in a window, by name."""
    begin = history.sums[window.first - 1].now_ps if window.first else 0
    seconds = (history.sums[window.last - 1].now_ps - begin) / PICOSECONDS
    preempted = Counter(requests[number].tenant for number in history.preempted)
    finished: dict[str, list[int]] = {}
    for number in history.finished[window.first : window.last]:
        finished.setdefault(requests[number].tenant, []).append(number)
    return {
        tenant: TenantMeasures(
            len(numbers),
            sum(requests[number].output_tokens for number in numbers) / seconds,
            _spread([history.first_ps[i] - history.arrived_ps[i] for i in numbers]),
            preempted[tenant],
        )
        for tenant, numbers in sorted(finished.items())
    }


class Interval(NamedTuple):
    """A mean and half of its 95 % confidence interval; None of one value."""

    mean: float
    half: float | None


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values with its confidence interval (Student's t).

    >>> interval([1.0, 3.0])
    Interval(mean=2.0, half=12.706)
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, None)
    freedom = len(values) - 1
    quantile = T_95[freedom - 1] if freedom <= len(T_95) else NORMAL_95
    return Interval(mean, float(quantile * np.std(values, ddof=1) / math.sqrt(len(values))))


def _spread(ps: Sequence[float]) -> Spread:
    if not ps:
        return Spread(math.nan, math.nan, math.nan)
    p50, p95, p99 = (
        np.quantile(np.array(ps, np.float64), (0.5, 0.95, 0.99)) / PICOSECONDS
    ).tolist()
    return Spread(p50, p95, p99)
