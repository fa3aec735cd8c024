"""Witness: told all that happens to pools; it counts, keeps events, and passes decisions on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from odma_service.learning import Change
from odma_service.pool import Pool
from odma_service.pool.policy import PolicyRecord
from odma_service.service.watch.decisions import DecisionLog
from odma_service.service.watch.events import ENDS_EPOCH, Events, Kind
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
    Change.SET: Kind.POLICY_SET,
    Change.RECALIBRATED: Kind.RECALIBRATED,
    Change.SAFETY_SHARE: Kind.SAFETY_SHARE,
}


class Tally:
    """What one pool refused since the service started, by operation and reason."""

    def __init__(self) -> None:
        self.refusals: Counter[tuple[str, Reason]] = Counter()
        self.advised = 0
        """Refusals that named whom to preempt."""

    def add(self, ops: Sequence[Op], results: Sequence[Result]) -> None:
        """Count the refusals of a batch. Only the thread that holds the pool may."""
        for i, result in enumerate(results):
            if type(result) is Refusal:
                self.refusals[OP_NAMES[type(ops[i])], result.reason] += 1
                self.advised += result.preempt_handle != 0


class PoolObserver:
    """Told by the Learner of one pool."""

    def __init__(
        self,
        pool: Pool,
        tally: Tally,
        events: Events,
        decisions: DecisionLog | None,
        spans: Spans,
    ) -> None:
        self._pool = pool
        self._tally = tally
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
        self._tally.add(ops, results)
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


class Witness:
    """Told by the registry. One for a service."""

    def __init__(
        self,
        events: Events | None = None,
        decisions: DecisionLog | None = None,
        spans: Spans | None = None,
    ) -> None:
        self.events = events or Events()
        self.decisions = decisions
        self.spans = spans or Spans()
        self._tallies: dict[str, Tally] = {}
        self._owners: dict[str, str] = {}

    def observer_of(self, pool: Pool) -> PoolObserver:
        """Return the observer of a pool that was made, found or opened."""
        tally = self._tallies.setdefault(pool.spec.name, Tally())
        self._owners[pool.spec.name] = pool.spec.owner
        if self.decisions is not None:
            self.decisions.adopt(pool)
        return PoolObserver(pool, tally, self.events, self.decisions, self.spans)

    def tally(self, pool: str) -> Tally:
        """Return what a pool refused."""
        return self._tallies.get(pool) or Tally()

    def tell(
        self, kind: Kind, pool: str, epoch: int = 0, *, reason: str = "", file: str = ""
    ) -> None:
        """Take note of an event of a pool. `file` is for the log line only."""
        owner = self._owners.get(pool, "")
        self.spans.event(kind.name, pool, reason)
        self.events.tell(kind, pool, epoch, reason=reason, owner=owner, file=file)
        if kind in {Kind.SET_ASIDE, Kind.FORGOTTEN}:
            self._tallies.pop(pool, None)
            self._owners.pop(pool, None)
        if kind in ENDS_EPOCH and self.decisions is not None:
            self.decisions.epoch_over(pool)

    def close(self) -> None:
        """Write what was decided; nothing follows."""
        self.events.end()
        if self.decisions is not None:
            self.decisions.close()
        self.spans.close()
