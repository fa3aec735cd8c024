"""Learner: a pool that predicts how long answers will be, from those it has seen.

A caller that can wait for a model away from the pool's lock goes three steps: `asks` under the
lock, `answers` without it, then `apply` with the answers under the lock again. `apply` alone
does all three.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from odma_service._native import LEARNT_ENOUGH
from odma_service.errors import RefusedError
from odma_service.learning.calibration import Coverage, Source, coverage
from odma_service.learning.drift import has_news, is_worth_it
from odma_service.learning.expected import cheapest
from odma_service.learning.forecast import Forecast, Forecaster, Question
from odma_service.learning.observer import Change
from odma_service.learning.recalibration import (
    RecalibrationReport,
    recalibrate,
    seen_weights,
)
from odma_service.learning.safety import adapted_share
from odma_service.values import Allocate, Free, Prediction, Start

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from odma_service.learning.forecast import Model
    from odma_service.learning.observer import Observer
    from odma_service.pool import Pool
    from odma_service.pool.policy import PolicyRecord
    from odma_service.values import (
        Answer,
        Batch,
        Caller,
        Copy,
        Extend,
        Freed,
        Op,
        Place,
        Predicted,
        Quantiles,
        Result,
    )

FREES_PER_ADAPTATION = 64
LEAST_SHARE_CHANGE = 0.005
STALE_STEPS = 16
"""A completion more among a hundred changes little, and an engine waits for the answer."""


class ClassCoverage(NamedTuple):
    """How predictions for a class fared, and the source of the next one."""

    coverage: Coverage
    source: Source


Done = TypeVar("Done", bound="Place | Freed")


class Learner:
    """Predictions, recalibration after drift and the adaptive safety share around one pool.

    What was learnt is in the pool's books: a Learner can be made anew at any time. `model`
    gives the model of the moment; without one predictions are the live histograms'. What is
    known about a class is read anew once it is `stale_steps` decode steps old. A batch is a
    step, unless `step` counts them otherwise.
    """

    def __init__(
        self,
        pool: Pool,
        observer: Observer | None = None,
        *,
        model: Callable[[], Model | None] = lambda: None,
        stale_steps: int = STALE_STEPS,
        step: Callable[[], int] | None = None,
    ) -> None:
        self.pool = pool
        self._observer = observer
        self._model = model
        self._stale_steps = stale_steps
        self._forecaster = Forecaster(pool, step or (lambda: pool.last_seq))
        self._frees = 0
        self._counted = _ends(pool)
        self._calibrated: NDArray[np.float64] | None = None  # lengths when limits were looked at
        self._adapting = pool.policy()  # its safety share is the last one computed

    def apply(
        self,
        epoch: Caller | int,
        batch: Batch,
        predictions: Sequence[Predicted | None] | None = None,
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
        self._frees += list(map(type, batch.ops)).count(Free)
        if self._frees >= FREES_PER_ADAPTATION:
            self._frees = 0
            self._adapt_safety_share()
            self._follow_drift()
        return answer

    def allocate(
        self,
        epoch: Caller | int,
        op: Allocate,
        predictions: Sequence[Predicted | None] | None = None,
    ) -> Place:
        """Allocate as Pool.allocate does, with a prediction."""
        known = predictions or self._predictions([op]) or [None]
        return self._told(op, known, lambda: self.pool.allocate(epoch, op, known[0]))

    def extend(self, epoch: Caller | int, op: Extend) -> Place:
        """Extend as Pool.extend does."""
        return self._told(op, None, lambda: self.pool.extend(epoch, op))

    def free(self, epoch: Caller | int, op: Free) -> Freed:
        """Free as Pool.free does."""
        return self._told(op, None, lambda: self.pool.free(epoch, op))

    def reconcile(
        self, epoch: Caller | int, handles: Sequence[int], completed_seq: int = 0
    ) -> tuple[list[Place], list[int]]:
        """Free what is not listed as Pool.reconcile does."""
        places, freed = self.pool.reconcile(epoch, handles, completed_seq)
        if self._observer is not None:
            self._observer.reconciled(freed)
        return places, freed

    def set_policy(
        self,
        policy: PolicyRecord,
        expected_version: int | None = None,
        caller: Caller | None = None,
    ) -> int:
        """Install a policy as Pool.set_policy does."""
        return self._install(policy, expected_version, Change.SET, "asked for", caller)

    def asks(self, ops: Sequence[Op], seq: int | None = None) -> Question | None:
        """Return the question that a model has to answer about these operations, None for none.

        `seq` is that of their batch: a batch that cannot be new needs no model.
        """
        model = self._model() if self._uses_predictions() else None
        new = seq is None or seq == self.pool.last_seq + 1
        if model is None or not new or not any(isinstance(op, Allocate) for op in ops):
            return None
        return self._forecaster.question(model, _allocates(ops), self._stale_steps)

    def question(self, ops: Sequence[Op], stale_steps: int | None = None) -> Question:
        """Return what is known about those operations that allocate.

        `stale_steps` takes the place of the Learner's; 0: what the books say now.
        """
        stale = self._stale_steps if stale_steps is None else stale_steps
        return self._forecaster.question(self._model(), _allocates(ops), stale)

    def coverage(self, request_class: str) -> ClassCoverage:
        """Return how the predictions for the last completions of a class fared."""
        known = self._forecaster.known(request_class)
        calibration = self._forecaster.knowledge(request_class, stale_steps=0).calibration
        modelled = self._model() is not None and calibration is not None
        source = calibration.source if modelled and calibration else Source.HISTOGRAM
        if known.ever == 0 or not self._uses_predictions():
            source = Source.NOTHING
        return ClassCoverage(coverage(known), source)

    @property
    def model_version(self) -> str:
        """The model of the moment, "" if there is none."""
        model = self._model()
        return "" if model is None else model.version

    def recalibrate(
        self,
        dry_run: bool = False,
        expected_version: int | None = None,
        limits: int = 0,
        caller: Caller | None = None,
    ) -> RecalibrationReport:
        """Find the bucket limits that waste least, and install them unless dry_run.

        `limits` 0: as many as the policy has. Raises NothingLearntError without buckets or
        with fewer than 32 completions, VersionError, InvalidError.
        """
        return self._recalibrate(dry_run, expected_version, limits, "asked for", caller)

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
        self,
        dry_run: bool,
        expected_version: int | None,
        limits: int,
        why: str,
        caller: Caller | None,
    ) -> RecalibrationReport:
        before = self.pool.policy()
        report = recalibrate(
            self.pool,
            dry_run=dry_run,
            expected_version=expected_version,
            limits=limits,
            caller=caller,
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
        self,
        policy: PolicyRecord,
        expected_version: int | None,
        change: Change,
        why: str,
        caller: Caller | None = None,
    ) -> int:
        before = self.pool.policy()
        version = self.pool.set_policy(policy, expected_version, caller)
        if self._observer is not None:
            self._observer.policy_changed(change, before, self.pool.policy(), why)
        return version

    def _told(
        self, op: Op, predictions: Sequence[Predicted | None] | None, do: Callable[[], Done]
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
        predictions: Sequence[Predicted | None] | None,
        results: Sequence[Result],
        copies: Sequence[Copy] = (),
    ) -> None:
        if self._observer is not None:
            known = None if predictions is None else [_acted_on(one) for one in predictions]
            self._observer.decided(ops, known, results, copies)

    def _uses_predictions(self) -> bool:
        policy = self.pool.policy()
        return policy.start == Start.QUANTILE or policy.unsure_ratio > 0

    def _predictions(self, ops: Sequence[Op]) -> list[Predicted | None] | None:
        return predictions_of(self.question(ops).answers()) if self._uses_predictions() else None

    def _adapt_safety_share(self) -> None:
        before, self._counted = self._counted, _ends(self.pool)
        policy = self.pool.policy()
        if policy.name != "elastic":
            return
        if policy.version != self._adapting.version:
            self._adapting = policy
        preempted, completed = (now - then for now, then in zip(self._counted, before, strict=True))
        share = adapted_share(self._adapting.safety_share, preempted, completed)
        share = min(share, policy.unguaranteed_share)
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


def _acted_on(prediction: Predicted | None) -> Quantiles | None:
    return prediction.quantiles if isinstance(prediction, Prediction) else prediction


def predictions_of(answers: Sequence[Forecast | None]) -> list[Predicted | None]:
    """Return the prediction for each operation, as a pool takes it."""
    return [_prediction(forecast) for forecast in answers]


def _prediction(forecast: Forecast | None) -> Predicted | None:
    """Return the prediction: a model's word alone is kept, but trusted after 32 completions."""
    if forecast is None:
        return None
    quantiles = forecast.quantiles
    if forecast.raw is None:
        return quantiles
    if forecast.source is Source.MODEL and forecast.completions < LEARNT_ENOUGH:
        quantiles = None
    return Prediction(quantiles, forecast.raw)


def _allocates(ops: Sequence[Op]) -> list[Allocate | None]:
    return [op if isinstance(op, Allocate) else None for op in ops]
