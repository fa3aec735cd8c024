"""Predictors: what is known about the length of an answer before it is there.

live           quantiles of the answers that have finished, from the pool's own histograms
history        the same of the lately finished and the running, corrected: a model without one
model          the model that we ship, or another directory's (model:DIR), corrected; it needs
               prompts, so the trace has to be a set of prompts
exact          the length itself
lognormal:S    the length times a log-normal error of sigma S, with that sigma known
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from odma_service.errors import InvalidError
from odma_service.learning import Model
from odma_service.learning import predictor as model_of
from odma_service.learning.history import as_quantiles
from odma_service.learning.predictor import PromptInput
from odma_service.replay.load import Load
from odma_service.replay.memory import Asked
from odma_service.values import Quantiles

NAMES = "live, history, model, model:DIR, exact or lognormal:SIGMA"
NORMAL_QUANTILES = (-1.2816, -0.6745, 0.0, 0.6745, 1.2816, 1.6449, 2.3263)
"""Of the standard normal distribution, at QUANTILE_LEVELS."""


class LengthsAlone:
    """A model that knows the history only."""

    @property
    def version(self) -> str:
        """Its name."""
        return "history"

    def predict(self, prompts: Sequence[PromptInput]) -> list[Quantiles]:
        """Return the quantiles of each prompt's history."""
        return [as_quantiles(np.expm1(np.array(prompt.history.quantiles))) for prompt in prompts]


class Predictor(NamedTuple):
    """One guess for each request, and how far off guesses are.

    Without guesses the pool predicts: with the model, else from its histograms.
    """

    name: str
    guesses: tuple[float, ...] | None
    factors: Quantiles
    model: Model | None = None

    @property
    def own(self) -> bool:
        """Whether predictions come from here."""
        return self.guesses is not None

    def quantiles(self, asked: Asked) -> Quantiles | None:
        """Return quantiles of a request's output tokens, None if the pool predicts."""
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
    if name == "history":
        return Predictor(name, None, flat, LengthsAlone())
    kind, _, directory = name.partition(":")
    if kind == "model":
        if not any(request.text for request in load.requests):
            raise InvalidError("predictor", f"model needs prompts, and {load.label} has none")
        return Predictor(name, None, flat, _model(directory))
    lengths = np.array([request.output_tokens for request in load.requests], np.float64)
    if name == "exact":
        return Predictor(name, tuple(lengths.tolist()), flat)
    sigma = _sigma(name)
    random = np.random.default_rng((seed, 1))
    guesses = lengths * np.exp(random.normal(0.0, sigma, len(lengths)))
    a, b, c, d, e, f, g = (math.exp(sigma * z) for z in NORMAL_QUANTILES)
    return Predictor(name, tuple(guesses.tolist()), (a, b, c, d, e, f, g))


@cache
def _model(directory: str) -> model_of.Predictor:
    return model_of.Predictor.load(Path(directory) if directory else model_of.default_model())


def _sigma(name: str) -> float:
    kind, _, number = name.partition(":")
    try:
        sigma = float(number) if kind == "lognormal" else -1.0
    except ValueError:
        sigma = -1.0
    if not 0 <= sigma <= 5:
        raise InvalidError("predictor", f"{NAMES}, not {name!r}")
    return sigma
