"""Observer: hears what a Learner did, for metrics, events and logs.

The thread that holds the pool calls it, between the decision and its answer. So it returns
soon, waits for nothing and does not raise.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from odma_service.pool.policy import PolicyRecord
    from odma_service.values import Copy, Op, Quantiles, Result


class Change(Enum):
    """Why a policy changed: a caller set it, limits were found, or the safety share adapted."""

    SET = 1
    RECALIBRATED = 2
    SAFETY_SHARE = 3


class Observer(Protocol):
    """The calls to an observer of one pool."""

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
