"""Foresight: how long the answers to requests will be, and what that rests on.

It works in two halves, because a model takes longer than a batch may hold its pool's lock.
Under the lock it is noted what the books say about each request's class; away from it the
model is asked, and corrected by what was noted.

    with a model       its prediction from prompt and history, corrected, or the window
    without            quantiles of the live histograms
    a resubmitted one  the same, given that it is longer than what it has generated already
    an engine's guess  the same, scaled so that the guess is the median
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from odma_service._native import text_of
from odma_service.learning.calibration import Calibration, Source, calibrate
from odma_service.learning.history import Evidence, as_quantiles, lately
from odma_service.learning.predictor import History, PromptInput
from odma_service.learning.recalibration import LEARNT_ENOUGH
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


class Basis(NamedTuple):
    """What the books say about a class. calibration None: too little, and nothing is corrected."""

    history: History
    calibration: Calibration | None
    completions: int


class Known(NamedTuple):
    """A basis, and the completions and the batch that it was computed after."""

    ever: int
    seq: int
    basis: Basis

    def holds(self, ever: int, seq: int, steps: int) -> bool:
        """Whether it is as the books are, or younger than `steps` with nothing to gain.

        There is something to gain where a first calibration has become possible.
        """
        if seq == self.seq:
            return ever == self.ever
        known = self.basis.calibration is not None or ever < LEARNT_ENOUGH
        return known and 0 < seq - self.seq < steps


class Foreseen(NamedTuple):
    """Quantiles of output tokens, and what they rest on; raw: as the model said."""

    quantiles: Quantiles | None
    raw: Quantiles | None
    source: Source
    completions: int


class Asked(NamedTuple):
    """One request to foresee. histogram: what the live histograms say, where no model is asked."""

    prompt: PromptInput | None
    basis: Basis
    histogram: Quantiles | None
    generated_tokens: int
    guess: int | None


Key = tuple[bytes | None, int, int]
"""Digest of the text, prompt tokens and the identity of the history, which is cheaper than it."""


class Recent:
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
    """What was noted under the lock. `answers` needs no lock. None: no sound request."""

    predictor: Model | None
    asked: Sequence[Asked | None]
    recent: Recent

    def answers(self) -> list[Foreseen | None]:
        """Return what is foreseen for each request, None where there is none."""
        prompts = [one.prompt for one in self.asked if one is not None and one.prompt is not None]
        model = self.predictor if prompts else None
        said = iter(() if model is None else self.recent.predict(model, prompts))
        return [
            None if one is None else _foreseen(one, None if one.prompt is None else next(said))
            for one in self.asked
        ]


class Foresight:
    """Questions about the requests of one pool.

    What the books say about a class takes a millisecond. It is computed when it is asked for
    after they changed, but not while it is younger than `stale_steps` batches.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._bases: dict[str | None, Known] = {}
        self._recent = Recent()

    def question(
        self, predictor: Model | None, ops: Sequence[Allocate | None], stale_steps: int
    ) -> Question:
        """Note what is known about each request. Without a predictor no model is asked."""
        bases: dict[str, Basis] = {}
        asked = [self._asked(predictor, op, bases, stale_steps) for op in ops]
        return Question(predictor, asked, self._recent)

    def basis(self, request_class: str, stale_steps: int) -> Basis:
        """Return what is known about a class, or about all where it has fewer than 32."""
        scope, ever = self._pool.scope(request_class, LEARNT_ENOUGH)
        seq = self._pool.last_seq
        known = self._bases.get(scope)
        if known is None or not known.holds(ever, seq, stale_steps):
            known = self._bases[scope] = Known(ever, seq, _basis(self.evidence(scope)))
        return known.basis

    def evidence(self, request_class: str | None) -> Evidence:
        """Return what a class has shown, None for all together."""
        return Evidence(*self._pool.shown(request_class))

    def _asked(
        self,
        predictor: Model | None,
        op: Allocate | None,
        bases: dict[str, Basis],
        stale_steps: int,
    ) -> Asked | None:
        text = None if op is None else text_of(op.text)
        if op is None or not _is_sound(op, text):
            return None
        guess = op.predicted_output_tokens
        if predictor is None:
            histogram = self._pool.quantiles(op.request_class, op.generated_tokens)
            return Asked(None, _NO_BASIS, histogram, op.generated_tokens, guess)
        basis = bases.get(op.request_class)
        if basis is None:
            basis = bases[op.request_class] = self.basis(op.request_class, stale_steps)
        prompt = PromptInput(text, op.prompt_tokens, basis.history)
        return Asked(prompt, basis, None, op.generated_tokens, guess)


_NO_BASIS = Basis(History(), None, 0)


def _basis(evidence: Evidence) -> Basis:
    lengths = lately(evidence)
    if lengths is None:
        return _NO_BASIS
    enough = evidence.ever >= LEARNT_ENOUGH
    return Basis(
        History.of_lengths(lengths),
        calibrate(evidence, lengths) if enough else None,
        len(evidence.ring),
    )


def _foreseen(asked: Asked, raw: Quantiles | None) -> Foreseen:
    calibration = asked.basis.calibration
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
    return Foreseen(quantiles, raw, source, asked.basis.completions)


def longer_than(quantiles: Quantiles, tokens: int) -> Quantiles:
    """Return the quantiles of the lengths above `tokens`, were these those of all lengths.

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
