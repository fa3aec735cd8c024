"""What a call is made of, told to nobody. `tracing.Traces` is the kind that tells."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock

from odma_service.values import Copy, Op, Result

_NOTHING = nullcontext()


class Spans:
    """Spans inside the call that this thread answers. This kind costs next to nothing."""

    def part(self, name: str) -> AbstractContextManager[object]:
        """Return the context of a part that takes time of its own."""
        return _NOTHING

    def waiting(self, lock: Lock) -> AbstractContextManager[object]:
        """Hold a lock for a context; to wait for it is a part."""
        return lock

    def serves(self, pool: str, epoch: int) -> None:
        """Say which pool the call is about."""

    def decided(self, ops: Sequence[Op], results: Sequence[Result], copies: Sequence[Copy]) -> None:
        """Say what became of the call's operations."""

    def event(self, kind: str, pool: str, reason: str) -> None:
        """Say what else happened to a pool."""

    def close(self) -> None:
        """Send what is left."""
