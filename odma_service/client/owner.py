"""What the owner of a pool has to remember, however its calls are made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from odma_service.errors import OdmaError, UnavailableError
from odma_service.rpc.v1 import memory_service_pb2 as pb


class Owner:
    """One epoch of a pool, and how far its batches are."""

    def __init__(self, response: pb.OpenPoolResponse) -> None:
        self.response = response
        self.ref = response.pool
        self.seq = 0
        """Last answered batch."""
        self.completed_seq = 0
        """As the last batch promised."""
        self.pending: pb.ApplyRequest | None = None
        """A batch without an answer: the service may or may not have done it."""

    def prepare(
        self,
        used: Iterable[pb.Used],
        ops: Iterable[pb.Op],
        completed_seq: int | None,
        max_copy_tokens: int | None,
        *,
        pass_refused: bool,
    ) -> None:
        """Make the next batch. Raises OdmaError while one has no answer."""
        if self.pending is not None:
            raise OdmaError(f"batch {self.pending.seq} has no answer yet; resume it first")
        self.pending = pb.ApplyRequest(
            pool=self.ref,
            seq=self.seq + 1,
            completed_seq=self.completed_seq if completed_seq is None else completed_seq,
            max_copy_tokens=max_copy_tokens,
            pass_refused=pass_refused,
            used=used,
            ops=ops,
        )

    @contextmanager
    def waiting(self) -> Iterator[pb.ApplyRequest]:
        """Yield the batch without an answer; it has one when the context ends without an error.

        An error that says that the batch was not done makes room for another. Raises OdmaError
        if there is no such batch.
        """
        request = self.pending
        if request is None:
            raise OdmaError(f"batch {self.seq} was answered; there is nothing to resume")
        try:
            yield request
        except UnavailableError:
            raise
        except OdmaError:
            self.pending = None
            raise
        self.pending = None
        self.seq = request.seq
        self.completed_seq = request.completed_seq

    def reconciled(self, answer: pb.ReconcileResponse) -> None:
        """Go on after the last answered seq."""
        self.pending = None
        self.seq = self.completed_seq = answer.last_seq
