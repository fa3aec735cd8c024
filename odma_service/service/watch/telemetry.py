"""Telemetry: counts refusals, keeps events, logs decisions and marks spans, for all pools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from odma_service.learning import Change
from odma_service.pool import Pool
from odma_service.pool.policy import PolicyRecord
from odma_service.service.pools.models import Models
from odma_service.service.watch.decisions import DecisionLog
from odma_service.service.watch.events import ENDS_EPOCH, EventKind, Events
from odma_service.service.watch.lines import Lines
from odma_service.service.watch.spans import Spans
from odma_service.values import (
    Allocate,
    Copy,
    Extend,
    Free,
    Op,
    Quantiles,
    Reason,
    Refusal,
    Result,
    Trim,
)

OP_NAMES: dict[type[Op], str] = {
    Allocate: "allocate",
    Extend: "extend",
    Trim: "trim",
    Free: "free",
}
_KINDS = {
    Change.SET: EventKind.POLICY_SET,
    Change.RECALIBRATED: EventKind.RECALIBRATED,
    Change.SAFETY_SHARE: EventKind.SAFETY_SHARE,
}


class RefusalCounts:
    """Refusals of one pool since the service started."""

    def __init__(self) -> None:
        self.by_reason: Counter[tuple[str, Reason]] = Counter()
        """By name of the operation and reason."""
        self.advised = 0
        """Refusals that named a region to preempt."""

    def add(self, ops: Sequence[Op], results: Sequence[Result]) -> None:
        """Count the refusals of a batch. Only the thread that holds the pool may."""
        if Refusal not in map(type, results):
            return
        for op, result in zip(ops, results, strict=True):
            if type(result) is Refusal:
                self.by_reason[OP_NAMES[type(op)], result.reason] += 1
                self.advised += result.preempt_handle != 0


class PoolObserver:
    """Observes the Learner of one pool."""

    def __init__(
        self,
        pool: Pool,
        refusals: RefusalCounts,
        events: Events,
        decisions: DecisionLog | None,
        spans: Spans,
    ) -> None:
        self._pool = pool
        self._refusals = refusals
        self._events = events
        self._spans = spans
        self._decisions = decisions

    def decided(
        self,
        ops: Sequence[Op],
        predictions: Sequence[Quantiles | None] | None,
        results: Sequence[Result],
        copies: Sequence[Copy],
    ) -> None:
        self._refusals.add(ops, results)
        self._spans.decided(ops, results, copies)
        if self._decisions is not None:
            self._decisions.decided(self._pool, ops, predictions, results, copies)

    def reconciled(self, freed: Sequence[int]) -> None:
        if self._decisions is not None:
            self._decisions.reconciled(self._pool, freed)

    def policy_changed(
        self, change: Change, before: PolicyRecord, after: PolicyRecord, why: str
    ) -> None:
        self._spans.event(_KINDS[change].name, self._pool.spec.name, why)
        self._events.tell(
            _KINDS[change],
            self._pool.spec.name,
            self._pool.epoch,
            reason=why,
            policy_version=after.version,
            owner=self._pool.spec.owner,
        )


class Telemetry:
    """Where the registry reports. One for a service."""

    def __init__(
        self,
        events: Events | None = None,
        decisions: DecisionLog | None = None,
        spans: Spans | None = None,
        log_lines: Lines | None = None,
        models: Models | None = None,
    ) -> None:
        self.log_lines = log_lines
        self.models = models
        self.events = events or Events()
        self.decisions = decisions
        self.spans = spans or Spans()
        self._refusals: dict[str, RefusalCounts] = {}
        self._owners: dict[str, str] = {}

    def observer_of(self, pool: Pool) -> PoolObserver:
        """Return the observer of a pool that was made, found or opened."""
        refusals = self._refusals.setdefault(pool.spec.name, RefusalCounts())
        self._owners[pool.spec.name] = pool.spec.owner
        if self.decisions is not None:
            self.decisions.adopt(pool)
        return PoolObserver(pool, refusals, self.events, self.decisions, self.spans)

    def refusals(self, pool: str) -> RefusalCounts:
        """Return the counts of a pool's refusals."""
        return self._refusals.get(pool) or RefusalCounts()

    def tell(
        self, kind: EventKind, pool: str, epoch: int = 0, *, reason: str = "", file: str = ""
    ) -> None:
        """Report an event of a pool. `file` is for the log line only."""
        owner = self._owners.get(pool, "")
        self.spans.event(kind.name, pool, reason)
        self.events.tell(kind, pool, epoch, reason=reason, owner=owner, file=file)
        if kind in {EventKind.SET_ASIDE, EventKind.FORGOTTEN}:
            self._refusals.pop(pool, None)
            self._owners.pop(pool, None)
        if kind in ENDS_EPOCH and self.decisions is not None:
            self.decisions.epoch_over(pool)

    def close(self) -> None:
        """Write the last decisions and spans; nothing follows."""
        self.events.end()
        if self.decisions is not None:
            self.decisions.close()
        self.spans.close()
