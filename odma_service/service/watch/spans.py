"""Spans of calls. Those here are empty; `tracing.OtelSpans` sends real ones."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock

from odma_service.values import Copy, Op, Result

_NOTHING = nullcontext()


class Spans:
    """Spans inside the call that this thread answers. They record nothing and cost next to it."""

    def part(self, name: str) -> AbstractContextManager[object]:
        """Return the context of a part that takes time of its own."""
        return _NOTHING

    def take(self, lock: Lock) -> None:
        """Take a pool's lock; waiting for it is a part."""
        if not lock.acquire(blocking=False):
            with self.part("wait for pool"):
                lock.acquire()

    def serves(self, pool: str, epoch: int) -> None:
        """Name the pool that the call is about."""

    def decided(self, ops: Sequence[Op], results: Sequence[Result], copies: Sequence[Copy]) -> None:
        """Record the outcome of the call's operations."""

    def event(self, kind: str, pool: str, reason: str) -> None:
        """Record another event of a pool."""

    def close(self) -> None:
        """Send the last spans."""
