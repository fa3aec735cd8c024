"""Predictors: what is known about the length of an answer before it is there.

live           quantiles of the answers that have finished, from the pool's own histograms
exact          the length itself
lognormal:S    the length times a log-normal error of sigma S, with that sigma known
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from odma_service.errors import InvalidError
from odma_service.replay.load import Load
from odma_service.replay.memory import Asked
from odma_service.values import Quantiles

NORMAL_QUANTILES = (-1.2816, -0.6745, 0.0, 0.6745, 1.2816, 1.6449, 2.3263)
"""Of the standard normal distribution, at QUANTILE_LEVELS."""


class Predictor(NamedTuple):
    """One guess for each request, and how far off guesses are. None: the pool's histograms."""

    name: str
    guesses: tuple[float, ...] | None
    factors: Quantiles

    @property
    def own(self) -> bool:
        """Whether predictions come from here."""
        return self.guesses is not None

    def quantiles(self, asked: Asked) -> Quantiles | None:
        """Return quantiles of a request's output tokens, None if the pool has to say."""
        if self.guesses is None:
            return None
        guess = self.guesses[asked.number]
        a, b, c, d, e, f, g = (guess * factor for factor in self.factors)
        return a, b, c, d, e, f, g


def predictor(name: str, load: Load, seed: int) -> Predictor:
    """Return the predictor called `name`. Raises InvalidError for another name."""
    flat: Quantiles = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    if name == "live":
        return Predictor(name, None, flat)
    lengths = np.array([request.output_tokens for request in load.requests], np.float64)
    if name == "exact":
        return Predictor(name, tuple(lengths.tolist()), flat)
    sigma = _sigma(name)
    random = np.random.default_rng((seed, 1))
    guesses = lengths * np.exp(random.normal(0.0, sigma, len(lengths)))
    a, b, c, d, e, f, g = (math.exp(sigma * z) for z in NORMAL_QUANTILES)
    return Predictor(name, tuple(guesses.tolist()), (a, b, c, d, e, f, g))


def _sigma(name: str) -> float:
    kind, _, number = name.partition(":")
    try:
        sigma = float(number) if kind == "lognormal" else -1.0
    except ValueError:
        sigma = -1.0
    if not 0 <= sigma <= 5:
        raise InvalidError("predictor", f"live, exact or lognormal:SIGMA, not {name!r}")
    return sigma
