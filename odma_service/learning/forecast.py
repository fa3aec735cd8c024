"""Forecast: how long the answers to requests will be, and what that rests on.

It is made in two halves, because a model takes longer than a batch may hold its pool's lock.
Under the lock a Question notes what the books say about each request's class; away from the
lock the model answers it, corrected by what was noted.

    with a model       its prediction from prompt and history, corrected, or the window
    without            quantiles of the live histograms
    resubmitted        the same, given that the answer is longer than what was generated already
    an engine's guess  the same, scaled so that the guess is the median
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from odma_service._native import LEARNT_ENOUGH, text_of
from odma_service.learning.calibration import Calibration, Source, calibrate
from odma_service.learning.history import KnownRequests, as_quantiles, lately
from odma_service.learning.predictor import History, PromptInput
from odma_service.learning.survival import LEVELS
from odma_service.values import Allocate, Quantiles, Text

if TYPE_CHECKING:
    from odma_service.pool import Pool

MOST_TOKENS = 2**32 - 1
MEDIAN = 2  # its index among the quantiles
SURVIVAL = -np.log(1 - LEVELS)


class Model(Protocol):
    """What a Predictor offers here. Any thread may ask it."""

    @property
    def version(self) -> str:
        """Its name and version."""

    def predict(self, prompts: Sequence[PromptInput]) -> list[Quantiles]:
        """Return ascending quantiles of output tokens for each prompt."""


class ClassKnowledge(NamedTuple):
    """What the books say about a class. calibration None: too little, and nothing is corrected."""

    history: History
    calibration: Calibration | None
    completions: int


class CachedKnowledge(NamedTuple):
    """What was known after `ever` completions, at a decode step."""

    ever: int
    step: int
    knowledge: ClassKnowledge

    def holds(self, ever: int, step: int, stale_steps: int) -> bool:
        """Whether it is as the books are, or younger than `stale_steps`.

        It does not hold once a first calibration has become possible.
        """
        if step == self.step:
            return ever == self.ever
        calibrated = self.knowledge.calibration is not None or ever < LEARNT_ENOUGH
        return calibrated and 0 < step - self.step < stale_steps


class Forecast(NamedTuple):
    """Quantiles of output tokens, and what they rest on; raw: as the model said."""

    quantiles: Quantiles | None
    raw: Quantiles | None
    source: Source
    completions: int


class ForecastInput(NamedTuple):
    """One request. histogram: what the live histograms say, which is used where no model does."""

    prompt: PromptInput | None
    knowledge: ClassKnowledge
    histogram: Quantiles | None
    generated_tokens: int
    guess: int | None

    def without_model(self) -> ForecastInput:
        """Return the same request, of which no model is asked."""
        return self._replace(prompt=None, knowledge=_NOTHING)


Key = tuple[bytes | None, int, int]
"""Digest of the text, prompt tokens and the identity of the history, which is cheaper than it."""


class ModelCache:
    """What the model said of the requests that it was last asked about. Any thread may ask.

    A request that was refused is asked for again, unchanged, in step after step, and in a small
    batch the model takes longer than all the rest.
    """

    def __init__(self) -> None:
        self._last: tuple[Model | None, dict[Key, tuple[History, Quantiles]]] = None, {}

    def predict(self, model: Model, prompts: Sequence[PromptInput]) -> list[Quantiles]:
        """Return what the model says of each prompt."""
        of, last = self._last
        said = last if of is model else {}
        keys = [_key(prompt) for prompt in prompts]
        new = {key: one for key, one in zip(keys, prompts, strict=True) if key not in said}
        if new:
            answers = zip(new.items(), model.predict(list(new.values())), strict=True)
            said = said | {key: (one.history, answer) for (key, one), answer in answers}
        now = {key: said[key] for key in keys}
        self._last = model, now
        return [now[key][1] for key in keys]


def _key(prompt: PromptInput) -> Key:
    digest = None if prompt.text is None else prompt.text.digest
    return digest, prompt.prompt_tokens, id(prompt.history)


class Question(NamedTuple):
    """What was noted under the lock, None where there is no sound request."""

    predictor: Model | None
    inputs: Sequence[ForecastInput | None]
    cache: ModelCache

    def answers(self) -> list[Forecast | None]:
        """Return the forecast for each request, None where there is no input. Needs no lock.

        A model is a guest: where it fails, the histograms answer.
        """
        prompts = [one.prompt for one in self.inputs if one is not None and one.prompt is not None]
        model = self.predictor if prompts else None
        try:
            said = iter(() if model is None else self.cache.predict(model, prompts))
        except Exception:  # noqa: BLE001 - of somebody else's making, and counted where it is kept
            return [one and _forecast(one.without_model(), None) for one in self.inputs]
        return [
            None if one is None else _forecast(one, None if one.prompt is None else next(said))
            for one in self.inputs
        ]


class Forecaster:
    """Questions about the requests of one pool.

    To read what the books say about a class takes a millisecond. They are read again once they
    have changed and what was read is `stale_steps` old. `step` counts decode steps.
    """

    def __init__(self, pool: Pool, step: Callable[[], int]) -> None:
        self._pool = pool
        self._step = step
        self._classes: dict[str | None, CachedKnowledge] = {}
        self._cache = ModelCache()

    def question(
        self, predictor: Model | None, ops: Sequence[Allocate | None], stale_steps: int
    ) -> Question:
        """Note what is known about each request. Without a predictor no model is asked."""
        classes: dict[str, ClassKnowledge] = {}
        histograms: dict[tuple[str, int], Quantiles | None] = {}
        inputs = [self._input(predictor, op, classes, histograms, stale_steps) for op in ops]
        return Question(predictor, inputs, self._cache)

    def knowledge(self, request_class: str, stale_steps: int) -> ClassKnowledge:
        """Return what is known about a class, or about all where it has fewer than 32."""
        scope, ever = self._pool.scope(request_class, LEARNT_ENOUGH)
        step = self._step()
        cached = self._classes.get(scope)
        if cached is None or not cached.holds(ever, step, stale_steps):
            cached = CachedKnowledge(ever, step, _knowledge(self.known(scope)))
            self._classes[scope] = cached
        return cached.knowledge

    def known(self, request_class: str | None) -> KnownRequests:
        """Return the requests of a class, of all together for None."""
        return KnownRequests(*self._pool.shown(request_class))

    def _input(
        self,
        predictor: Model | None,
        op: Allocate | None,
        classes: dict[str, ClassKnowledge],
        histograms: dict[tuple[str, int], Quantiles | None],
        stale_steps: int,
    ) -> ForecastInput | None:
        text = None if op is None else text_of(op.text)
        if op is None or not _is_sound(op, text):
            return None
        guess = op.predicted_output_tokens
        asked = op.request_class, op.generated_tokens
        if asked not in histograms:
            histograms[asked] = self._pool.quantiles(*asked)
        histogram = histograms[asked]
        if predictor is None:
            return ForecastInput(None, _NOTHING, histogram, op.generated_tokens, guess)
        knowledge = classes.get(op.request_class)
        if knowledge is None:
            knowledge = classes[op.request_class] = self.knowledge(op.request_class, stale_steps)
        prompt = PromptInput(text, op.prompt_tokens, knowledge.history)
        return ForecastInput(prompt, knowledge, histogram, op.generated_tokens, guess)


_NOTHING = ClassKnowledge(History(), None, 0)


def _knowledge(known: KnownRequests) -> ClassKnowledge:
    lengths = lately(known)
    if lengths is None:
        return _NOTHING
    enough = known.ever >= LEARNT_ENOUGH
    return ClassKnowledge(
        History.of_lengths(lengths),
        calibrate(known, lengths) if enough else None,
        len(known.ring),
    )


def _forecast(asked: ForecastInput, raw: Quantiles | None) -> Forecast:
    calibration = asked.knowledge.calibration
    if raw is None:
        quantiles, source = asked.histogram, Source.HISTOGRAM
    elif calibration is None:
        quantiles, source = raw, Source.MODEL
    else:
        quantiles, source = calibration.corrected(raw), calibration.source
    if raw is not None and quantiles is not None and asked.generated_tokens:
        quantiles = longer_than(quantiles, asked.generated_tokens)
    if asked.guess is not None:
        known = quantiles if raw is None or calibration is not None else None
        quantiles, source = _guided(known, asked.guess), Source.GUESS
    if quantiles is None:
        source = Source.NOTHING
    return Forecast(quantiles, raw, source, asked.knowledge.completions)


def longer_than(quantiles: Quantiles, tokens: int) -> Quantiles:
    """Return the quantiles of the lengths above `tokens`, where `quantiles` are of all lengths.

    Lengths are taken to be linear in their logarithm against the logarithm of the share that
    is longer, beyond the last quantile too.
    """
    logs = np.log1p(np.array(quantiles))
    slope = max((logs[-1] - logs[-2]) / (SURVIVAL[-1] - SURVIVAL[-2]), 1e-3)
    here = float(np.log1p(tokens))
    if here > logs[-1]:
        past = SURVIVAL[-1] + (here - logs[-1]) / slope
    else:
        past = float(np.interp(here, logs, SURVIVAL, left=0.0))
    levels = past + SURVIVAL
    moved = np.interp(levels, SURVIVAL, logs) + slope * np.maximum(levels - SURVIVAL[-1], 0)
    return as_quantiles(np.expm1(np.minimum(np.maximum(moved, here), np.log1p(MOST_TOKENS))))


def _is_sound(op: Allocate, text: Text | None) -> bool:
    guess = 1 if op.predicted_output_tokens is None else op.predicted_output_tokens
    numbers = ((op.prompt_tokens, 0), (op.generated_tokens, 0), (guess, 1))
    return (
        type(op.request_class) is str
        and (op.text is None or text is not None)
        and all(type(value) is int and least <= value <= MOST_TOKENS for value, least in numbers)
    )


def _guided(history: Quantiles | None, guess: int) -> Quantiles:
    """Return the history scaled so that its median is the guess; flat without a history."""
    if history is None or history[MEDIAN] <= 0:
        return (float(guess),) * 7
    a, b, c, d, e, f, g = (quantile * guess / history[MEDIAN] for quantile in history)
    return a, b, c, d, e, f, g
