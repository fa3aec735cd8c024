"""Learner: a pool that predicts how long answers will be, from those it has seen."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from odma_service.learning.drift import has_news, is_worth_it
from odma_service.learning.expected import cheapest
from odma_service.learning.recalibration import (
    LEARNT_ENOUGH,
    RecalibrationReport,
    recalibrate,
    seen_weights,
)
from odma_service.learning.safety import adapted_share
from odma_service.values import Allocate, Free, Start

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from odma_service.pool import Pool
    from odma_service.values import Answer, Batch, Op, Place, Quantiles

FREES_PER_ADAPTATION = 64
LEAST_SHARE_CHANGE = 0.005
MOST_TOKENS = 2**32 - 1
MEDIAN = 2  # its index among the quantiles


class Learner:
    """Predictions, recalibration after drift and the adaptive safety share around one pool.

    What was learnt is in the pool's books: a Learner can be made anew at any time.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._frees = 0
        self._counted = _ends(pool)
        self._calibrated: NDArray[np.float64] | None = None  # lengths when limits were looked at
        self._adapting = pool.policy()  # its safety share is the last one computed

    def apply(
        self,
        epoch: int,
        batch: Batch,
        predictions: Sequence[Quantiles | None] | None = None,
    ) -> Answer:
        """Do a batch as Pool.apply does, with predictions where the policy needs them.

        `predictions`, one for each operation, take the place of the Learner's own. A batch
        that cannot be new is answered, or refused, before anything is predicted.
        """
        if batch.seq != self.pool.last_seq + 1:
            stored = self.pool.replay(epoch, batch)
            if stored is not None:
                return stored
        if predictions is None:
            predictions = self._predictions(batch.ops)
        answer = self.pool.apply(epoch, batch, predictions)
        self._frees += sum(isinstance(op, Free) for op in batch.ops)
        if self._frees >= FREES_PER_ADAPTATION:
            self._frees = 0
            self._adapt_safety_share()
            self._follow_drift()
        return answer

    def allocate(self, epoch: int, op: Allocate) -> Place:
        """Allocate as Pool.allocate does, with a prediction."""
        predictions = self._predictions([op]) or [None]
        return self.pool.allocate(epoch, op, predictions[0])

    def recalibrate(
        self, dry_run: bool = False, expected_version: int | None = None, limits: int = 0
    ) -> RecalibrationReport:
        """Find the bucket limits that waste least, and install them unless dry_run.

        `limits` 0: as many as the policy has. Raises NothingLearntError without buckets or
        with fewer than 32 completions, VersionError, InvalidError.
        """
        return recalibrate(
            self.pool, dry_run=dry_run, expected_version=expected_version, limits=limits
        )

    def _follow_drift(self) -> None:
        """Change limits and risk of `odma` if its lengths have drifted and it is worth it."""
        policy = self.pool.policy()
        if policy.name != "odma" or not policy.limits_tokens:
            return
        weights = seen_weights(self.pool)
        if weights.sum() < LEARNT_ENOUGH or not has_news(self._calibrated, weights):
            return
        best = cheapest(self.pool)
        if best is not None and is_worth_it(best.gain):
            self.pool.set_policy(best.policy, policy.version)
        self._calibrated = weights

    def _predictions(self, ops: Sequence[Op]) -> list[Quantiles | None] | None:
        policy = self.pool.policy()
        if policy.start != Start.QUANTILE and policy.unsure_ratio == 0:
            return None
        known: dict[tuple[str, int], Quantiles | None] = {}
        return [self._prediction(op, known) if isinstance(op, Allocate) else None for op in ops]

    def _prediction(
        self, op: Allocate, known: dict[tuple[str, int], Quantiles | None]
    ) -> Quantiles | None:
        """Return quantiles of the answer's length, None if nothing is known about it.

        They are those of the request's class, beyond what it has generated already. The
        engine's own guess becomes their median. A malformed operation gets none: the pool
        refuses it.
        """
        if not _is_sound(op):
            return None
        key = op.request_class, op.generated_tokens
        if key not in known:
            known[key] = self.pool.quantiles(*key)
        return _guided(known[key], op.predicted_output_tokens)

    def _adapt_safety_share(self) -> None:
        before, self._counted = self._counted, _ends(self.pool)
        policy = self.pool.policy()
        if policy.name != "elastic":
            return
        if policy.version != self._adapting.version:
            self._adapting = policy
        preempted, completed = (now - then for now, then in zip(self._counted, before, strict=True))
        share = adapted_share(self._adapting.safety_share, preempted, completed)
        self._adapting = replace(self._adapting, safety_share=share)
        if abs(share - policy.safety_share) >= LEAST_SHARE_CHANGE:
            self.pool.set_policy(policy.with_changes(safety_share=share))
            self._adapting = self.pool.policy()


def _ends(pool: Pool) -> tuple[int, int]:
    """Return how many requests were preempted and how many completed, ever."""
    counters = pool.report().counters
    return counters.preempted, counters.finished + counters.hit_limit


def _is_sound(op: Allocate) -> bool:
    guess = 1 if op.predicted_output_tokens is None else op.predicted_output_tokens
    numbers = ((op.generated_tokens, 0), (guess, 1))
    return type(op.request_class) is str and all(
        type(value) is int and least <= value <= MOST_TOKENS for value, least in numbers
    )


def _guided(history: Quantiles | None, guess: int | None) -> Quantiles | None:
    """Return the history scaled so that its median is the guess; flat without a history."""
    if guess is None:
        return history
    if history is None or history[MEDIAN] <= 0:
        return (float(guess),) * 7
    a, b, c, d, e, f, g = (quantile * guess / history[MEDIAN] for quantile in history)
    return a, b, c, d, e, f, g
