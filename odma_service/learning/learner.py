"""Learner: a pool that predicts how long answers will be, from those it has seen."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from odma_service.errors import RefusedError
from odma_service.learning.drift import has_news, is_worth_it
from odma_service.learning.expected import cheapest
from odma_service.learning.observer import Change
from odma_service.learning.recalibration import (
    LEARNT_ENOUGH,
    RecalibrationReport,
    recalibrate,
    seen_weights,
)
from odma_service.learning.safety import adapted_share
from odma_service.values import Allocate, Free, Start

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from odma_service.learning.observer import Observer
    from odma_service.policy import PolicyRecord
    from odma_service.pool import Pool
    from odma_service.values import (
        Answer,
        Batch,
        Copy,
        Extend,
        Freed,
        Op,
        Place,
        Quantiles,
        Result,
    )

FREES_PER_ADAPTATION = 64
LEAST_SHARE_CHANGE = 0.005
MOST_TOKENS = 2**32 - 1
MEDIAN = 2  # its index among the quantiles

Done = TypeVar("Done", bound="Place | Freed")


class Learner:
    """Predictions, recalibration after drift and the adaptive safety share around one pool.

    What was learnt is in the pool's books: a Learner can be made anew at any time.
    """

    def __init__(self, pool: Pool, observer: Observer | None = None) -> None:
        self.pool = pool
        self._observer = observer
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
        if not answer.replayed:
            self._tell(batch.ops, predictions, answer.results, answer.copies)
        self._frees += sum(isinstance(op, Free) for op in batch.ops)
        if self._frees >= FREES_PER_ADAPTATION:
            self._frees = 0
            self._adapt_safety_share()
            self._follow_drift()
        return answer

    def allocate(self, epoch: int, op: Allocate) -> Place:
        """Allocate as Pool.allocate does, with a prediction."""
        predictions = self._predictions([op]) or [None]
        return self._told(op, predictions, lambda: self.pool.allocate(epoch, op, predictions[0]))

    def extend(self, epoch: int, op: Extend) -> Place:
        """Extend as Pool.extend does."""
        return self._told(op, None, lambda: self.pool.extend(epoch, op))

    def free(self, epoch: int, op: Free) -> Freed:
        """Free as Pool.free does."""
        return self._told(op, None, lambda: self.pool.free(epoch, op))

    def reconcile(self, epoch: int, handles: Sequence[int]) -> tuple[list[Place], list[int]]:
        """Free what is not listed as Pool.reconcile does."""
        places, freed = self.pool.reconcile(epoch, handles)
        if self._observer is not None:
            self._observer.reconciled(freed)
        return places, freed

    def set_policy(self, policy: PolicyRecord, expected_version: int | None = None) -> int:
        """Install a policy as Pool.set_policy does."""
        return self._install(policy, expected_version, Change.SET, "asked for")

    def recalibrate(
        self, dry_run: bool = False, expected_version: int | None = None, limits: int = 0
    ) -> RecalibrationReport:
        """Find the bucket limits that waste least, and install them unless dry_run.

        `limits` 0: as many as the policy has. Raises NothingLearntError without buckets or
        with fewer than 32 completions, VersionError, InvalidError.
        """
        return self._recalibrate(dry_run, expected_version, limits, "asked for")

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
            self._install(
                best.policy,
                policy.version,
                Change.RECALIBRATED,
                f"lengths have drifted: limits {_listed(policy)} -> {_listed(best.policy)}, risk "
                f"{policy.overflow_risk:g} -> {best.policy.overflow_risk:g} would have written "
                f"to {best.gain:.3f} more of what is reserved",
            )
        self._calibrated = weights

    def _recalibrate(
        self, dry_run: bool, expected_version: int | None, limits: int, why: str
    ) -> RecalibrationReport:
        before = self.pool.policy()
        report = recalibrate(
            self.pool, dry_run=dry_run, expected_version=expected_version, limits=limits
        )
        after = self.pool.policy()
        if self._observer is not None and after.version != before.version:
            gain = f"{report.before.utilisation:.3f} -> {report.after.utilisation:.3f}"
            self._observer.policy_changed(
                Change.RECALIBRATED,
                before,
                after,
                f"{why}: of {report.completions:.0f} requests, weighed by their stay, limits "
                f"{_listed(before)} -> {_listed(after)} use {gain} of what they reserve",
            )
        return report

    def _install(
        self, policy: PolicyRecord, expected_version: int | None, change: Change, why: str
    ) -> int:
        before = self.pool.policy()
        version = self.pool.set_policy(policy, expected_version)
        if self._observer is not None:
            self._observer.policy_changed(change, before, self.pool.policy(), why)
        return version

    def _told(
        self, op: Op, predictions: list[Quantiles | None] | None, do: Callable[[], Done]
    ) -> Done:
        """Do one operation and tell the observer of its outcome."""
        try:
            result = do()
        except RefusedError as error:
            self._tell([op], predictions, [error.refusal])
            raise
        self._tell([op], predictions, [result])
        return result

    def _tell(
        self,
        ops: Sequence[Op],
        predictions: Sequence[Quantiles | None] | None,
        results: Sequence[Result],
        copies: Sequence[Copy] = (),
    ) -> None:
        if self._observer is not None:
            self._observer.decided(ops, predictions, results, copies)

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
            self._install(
                policy.with_changes(safety_share=share),
                None,
                Change.SAFETY_SHARE,
                f"{preempted} preempted, {completed} completed: "
                f"{policy.safety_share:.3f} -> {share:.3f}",
            )
            self._adapting = self.pool.policy()


def _ends(pool: Pool) -> tuple[int, int]:
    """Return how many requests were preempted and how many completed, ever."""
    counters = pool.report().counters
    return counters.preempted, counters.finished + counters.hit_limit


def _listed(policy: PolicyRecord) -> str:
    return " ".join(map(str, policy.limits_tokens))


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
