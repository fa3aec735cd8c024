"""Observer: who is told what a Learner did, for metrics, events and logs.

It is told by the thread that holds the pool, between the decision and its answer. So it
returns soon, waits for nothing and does not raise.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from odma_service.pool.policy import PolicyRecord
    from odma_service.values import Copy, Op, Quantiles, Result


class Change(Enum):
    """Who changed a policy: somebody by hand, new limits, or the adaptive safety share."""

    SET = 1
    RECALIBRATED = 2
    SAFETY_SHARE = 3


class Observer(Protocol):
    """What an observer of one pool is told."""

    def decided(
        self,
        ops: Sequence[Op],
        predictions: Sequence[Quantiles | None] | None,
        results: Sequence[Result],
        copies: Sequence[Copy],
    ) -> None:
        """Take note of operations that were done or refused for the first time."""

    def reconciled(self, freed: Sequence[int]) -> None:
        """Take note of the handles that a Reconcile freed."""

    def policy_changed(
        self, change: Change, before: PolicyRecord, after: PolicyRecord, why: str
    ) -> None:
        """Take note of another policy in force."""
