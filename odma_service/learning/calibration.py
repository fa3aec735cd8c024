"""Calibration: predictions corrected by how wrong the last ones were, or replaced by lengths alone.

A model's prediction is moved, level by level, so that the actual lengths of the last completions
fell where each level says (split conformal prediction in a rolling window; Vovk et al.,
Algorithmic Learning in a Random World, 2005). An integrating correction (ACI, quantile
tracking, PID) learns faster, but answers come late, and until they do it goes on integrating:
it winds up, and reserves many times the need. A window cannot.

    window       score of a completion: log(1 + actual) - log(1 + predicted), at each level, of
                 the newest 50, or of 100 or 200 if the older ones are like the newer
                 (Kolmogorov and Smirnov's test): scores of a change do not outlive it
    censoring    a request that stopped at its limit, or runs, has at least its score: one that
                 runs past its grant is a miss from that moment on
    delay        the scores are those of a life table (survival.py), and what is outstanding
                 makes a correction more cautious
    clipping     a correction leads to no length beyond the lately longest; while part of the
                 lengths is still unseen (history.py) it may widen a prediction, never narrow it
    gate         the lengths of the period, without any model, are the prediction where they fit
                 those completions better than the corrected model does

All of it is a function of the arena, so it is the same after a crash.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from odma_service.learning.drift import CRITICAL
from odma_service.learning.history import (
    KnownRequests,
    as_logs,
    as_quantiles,
    period_of,
)
from odma_service.learning.survival import (
    LEVELS,
    Distribution,
    Flags,
    Floats,
    life_table,
    outliving,
)
from odma_service.values import QUANTILE_LEVELS, Quantiles

MEDIAN = QUANTILE_LEVELS.index(0.5)
SCORED = (50, 100, 200)
"""Completions scored: as many of the newest as are of one kind."""
LEAST_SCORED = 32
OUTSTANDING = 0.3
"""The risk shrinks by this share for each running request per scored completion: the requests
that run may be of another kind than those that have ended."""
UNSEEN = 0.05
GATE_MARGIN = 0.97
"""Share of the model's loss that the window must beat: a model sees prompts change, it does not."""


class Source(StrEnum):
    """What a prediction rests on."""

    NOTHING = "nothing"
    HISTOGRAM = "histogram"
    MODEL = "model"
    WINDOW = "window"
    GUESS = "guess"


class Coverage(NamedTuple):
    """How many of `known` requests were as short as predicted, and the share that should be."""

    covered: int
    known: int
    target: float

    @property
    def share(self) -> float:
        """Return the share covered, 0 if nothing is known."""
        return self.covered / self.known if self.known else 0.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """A correction of predictions. `window` and `longest` are log(1 + output tokens)."""

    source: Source
    corrections: Floats
    window: Floats
    longest: float

    def corrected(self, raw: Quantiles) -> Quantiles:
        """Return the prediction to act on in the place of the model's."""
        if self.source is Source.WINDOW:
            return _ascending(self.window)
        logs = np.log1p(np.array(raw))
        moved = np.minimum(logs + self.corrections, np.maximum(logs, self.longest))
        return _ascending(moved)


def calibrate(known: KnownRequests, lengths: Distribution) -> Calibration:
    """Return the calibration that the last completions and the running requests ask for."""
    narrow = lengths.unseen <= UNSEEN
    window = lengths.at(_cautious(LEVELS, lengths.completions))
    longest = float(window[-1]) if narrow else np.inf
    ring = known.ring[_is_told(known.ring["raw"])][-SCORED[-1] :]
    if len(ring) < LEAST_SCORED:
        return Calibration(Source.MODEL, np.zeros(len(LEVELS)), window, longest)
    actual = np.log1p(ring["output_tokens"].astype(np.float64))[:, None]
    scores = actual - np.log1p(ring["raw"].astype(np.float64))
    newest = _of_one_kind(scores[:, MEDIAN])
    corrections = _corrections(known, newest)
    actual, scores, finished = actual[-newest:], scores[-newest:], ring["censored"][-newest:] == 0
    losses = [
        _loss(scores - _quantiles(scores, finished), finished),
        _loss(actual - _quantiles(np.repeat(actual, len(LEVELS), 1), finished), finished),
    ]
    source = Source.WINDOW if narrow and losses[1] < GATE_MARGIN * losses[0] else Source.MODEL
    if not narrow:
        corrections = np.maximum(corrections, 0)
    return Calibration(source, corrections, window, longest)


def coverage(known: KnownRequests) -> Coverage:
    """Return how often the last requests stayed within what was predicted for them.

    Each is judged at the risk that it accepted. A request that outgrows its prediction counts
    at once; one that was stopped below it counts nowhere.
    """
    seen = np.concatenate([known.ring, known.running])
    seen = seen[_is_told(seen["quantiles"])]
    if not len(seen):
        return Coverage(0, 0, 0.0)
    levels = 1 - seen["overflow_risk"].astype(np.float64)
    logs = np.log1p(seen["quantiles"].astype(np.float64))
    granted = np.array(
        [np.interp(level, LEVELS, row) for level, row in zip(levels, logs, strict=True)]
    )
    within = seen["output_tokens"] <= np.ceil(np.expm1(granted) - 1e-3)
    counted = ~within | (seen["censored"] == 0)
    return Coverage(
        int((within & counted).sum()), int(counted.sum()), float(levels[counted].mean())
    )


def _corrections(known: KnownRequests, requests: int) -> Floats:
    """Return the quantile of the scores at each level, in the period of the last requests."""
    period = period_of(known, requests)
    told = _is_told(period.seen["raw"])
    logs = np.log1p(period.seen["raw"][told].astype(np.float64))
    entered, reached = as_logs(period.entered[told]), as_logs(period.reached[told])
    ended = period.ended[told]
    found = np.empty(len(LEVELS))
    outstanding = len(known.running) / max(period.completions, 1)
    risks = 1 - _cautious(LEVELS, int(ended.sum()))
    levels = 1 - risks / (1 + OUTSTANDING * outstanding)
    for column, level in enumerate(levels):
        predicted = logs[:, column]
        table = life_table(entered - predicted, reached - predicted, ended)
        found[column] = table.at(np.array([level]))[0]
    return found


def _of_one_kind(scores: Floats) -> int:
    """Return how many of the newest scores to use."""
    newest = SCORED[0]
    for more in SCORED[1:]:
        older = np.sort(scores[-more:-newest])
        if not len(older):
            break
        newer = np.sort(scores[-newest:])
        both = np.concatenate([older, newer])
        apart = np.searchsorted(older, both, "right") / len(older)
        apart -= np.searchsorted(newer, both, "right") / len(newer)
        if np.abs(apart).max() > CRITICAL * (1 / len(older) + 1 / len(newer)) ** 0.5:
            break
        newest = more
    return min(newest, len(scores))


def _is_told(quantiles: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return for each row whether it has a prediction; a file may hold anything."""
    return np.isfinite(quantiles).all(axis=1) & (quantiles[:, 0] >= 0) & (quantiles[:, -1] > 0)


def _cautious(levels: Floats, count: int) -> Floats:
    """Return levels raised so that a new length, too, is below with their probability."""
    return np.minimum(levels * (count + 1) / max(count, 1), 1.0)


def _quantiles(scores: Floats, finished: Flags) -> Floats:
    """Return the quantile at LEVELS[i] of column i, where an unfinished score is a lower bound."""
    count = len(scores)
    order = np.argsort(scores, axis=0, kind="stable")
    ascending = np.take_along_axis(scores, order, 0)
    at_risk = np.arange(count, 0, -1)[:, None]
    below = 1 - outliving(finished[order], at_risk)
    places = (below < _cautious(LEVELS, count) - 1e-9).sum(axis=0)
    found = ascending[np.minimum(places, count - 1), np.arange(len(LEVELS))]
    return np.asarray(found, np.float64)


def _loss(errors: Floats, finished: Flags) -> float:
    """Return the mean pinball loss; an unfinished one counts where it is known to be above."""
    known = finished[:, None] | (errors > 0)
    return float(np.where(known, np.maximum(LEVELS * errors, (LEVELS - 1) * errors), 0).mean())


def _ascending(logs: Floats) -> Quantiles:
    return as_quantiles(np.expm1(np.maximum.accumulate(np.maximum(logs, 0))))
