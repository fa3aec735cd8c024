"""History: how long the answers of a class have lately been, seen while they still come in.

The last completions alone mislead when lengths change: the short answers end first, so the
long ones of a new kind are missing from them for hundreds of requests, though they have run
past every length known. So lengths are read from a life table of the period of the last 100
requests (Kaplan and Meier, JASA 1958, with delayed entry): at each length, of the requests
that reached it within the period, the share that ended there. One that runs counts up to
where it is; one that began before the period counts from where it was when that began, taking
it to have grown evenly.

A period is counted in requests begun, not in seconds: the books know no clock, and without
load nothing is learnt. All of it is a function of the arena: the ring of the last completions
and the regions that live, so it is the same after a crash.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from odma_service.learning.predictor import WINDOW
from odma_service.learning.survival import Distribution, Flags, Floats, life_table
from odma_service.values import Quantiles

BEYOND = (0.1, 0.35, 0.9)
"""Where the rest lies that outlives the table, in log above its end: the thirds' medians of an
exponential of mean 0.5, about the spread of answers to prompts of one kind."""


class KnownRequests(NamedTuple):
    """The last completions of a class, oldest first, and its running requests.

    Both are arrays of odma_completion. `ever` counts the completions there have been.
    """

    ring: NDArray[np.void]
    running: NDArray[np.void]
    ever: int


class Period(NamedTuple):
    """The requests seen in a period: completions, then running ones.

    entered and reached are tokens, when the period or the request began and when it ended or
    now; entered is -1 for a request that began within it. ended: finished, not stopped or running.
    """

    seen: NDArray[np.void]
    entered: Floats
    reached: Floats
    ended: Flags
    completions: int


def period_of(known: KnownRequests, requests: int) -> Period:
    """Return the period of the last `requests` that began, or of half as many completions."""
    ring, running = known.ring, known.running
    issues = np.sort(np.concatenate([ring["issue"], running["issue"]]).astype(np.float64))
    began = issues[-min(requests, len(issues))]
    until = ring["until"].astype(np.float64)
    count = max(int((until >= began).sum()), min(requests // 2, len(ring)))
    began = min(began, until[-count])
    seen = np.concatenate([ring[-count:], running])
    reached = seen["output_tokens"].astype(np.float64)
    return Period(seen, _entered(seen, reached, began), reached, seen["censored"] == 0, count)


def lately(known: KnownRequests) -> Distribution | None:
    """Return the lengths of the period of the last WINDOW requests, None without completions."""
    if not len(known.ring):
        return None
    period = period_of(known, WINDOW)
    return life_table(as_logs(period.entered), as_logs(period.reached), period.ended, BEYOND)


def as_logs(tokens: Floats) -> Floats:
    """Return log(1 + tokens); -inf for -1."""
    return np.log(np.maximum(1 + tokens, 0), out=np.full(len(tokens), -np.inf), where=tokens > -1)


def as_quantiles(values: Floats) -> Quantiles:
    """Return seven numbers as Quantiles."""
    a, b, c, d, e, f, g = values.tolist()
    return a, b, c, d, e, f, g


def _entered(seen: NDArray[np.void], reached: Floats, began: float) -> Floats:
    """Return the tokens that each request had when the period began."""
    issue, until = seen["issue"].astype(np.float64), seen["until"].astype(np.float64)
    before = np.clip(began - issue, 0, None) / np.maximum(until - issue, 1)
    return np.asarray(np.minimum(reached * before, reached) - (before == 0), np.float64)
