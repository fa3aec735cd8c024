"""A step that lets in requests with keys, and can be repeated without end.

Each request brings the keys of its prompt. Either all of it was kept, so the step adopts; or no
key was seen before, so the step takes them all into the books.
"""

from __future__ import annotations

import secrets

from lab.bench.building import BenchError
from lab.bench.decode_step import PLANES
from odma_service.client import Client
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.values import (
    KEY_BYTES,
    Allocate,
    Batch,
    End,
    Free,
    Moves,
    Op,
    Place,
    PolicyChange,
)
from odma_service.wire import batch_to

REQUESTS = 8
KEYS = 48
GRANULE = 128
REUSED = KEYS * GRANULE
STEP = 64


class KeyedStep:
    """A pool of its own, and the batches of a step whose requests are `known` or are not."""

    def __init__(self, service: Client, name: str, *, known: bool) -> None:
        self._known = known
        self._handles: list[int] = []
        self._keys = [secrets.token_bytes(KEYS * KEY_BYTES) for _ in range(REQUESTS)]
        self.pool = service.open_pool(
            name,
            moves=Moves.ANY,
            planes=PLANES,
            capacity_tokens=REQUESTS * (REUSED + GRANULE),
            single_ordered_stream=True,
            copies_may_overlap=True,
            granule_tokens=GRANULE,
            policy=PolicyChange(name="elastic", step_tokens=STEP, safety_share=0),
        )
        self._seq = 0
        if known:
            places = self.pool.apply(ops=self._asked()).results
            self._handles = [place.handle for place in places if isinstance(place, Place)]
            self.pool.apply(ops=self._freed())
            self._seq = self.pool.seq

    def ahead(self) -> pb.ApplyRequest:
        """Return the batch that is to be timed."""
        if not self._known:
            self._keys = [secrets.token_bytes(KEYS * KEY_BYTES) for _ in range(REQUESTS)]
        return self._batch(self._asked())

    def went(self, answer: pb.ApplyResponse) -> None:
        """Take the answer to ahead(). Raises BenchError if it was another step."""
        reused = [result.place.reused_tokens for result in answer.results]
        if reused != [REUSED if self._known else 0] * REQUESTS or answer.copies:
            raise BenchError(f"the step is not what it should be: {answer}")
        self._handles = [result.place.handle for result in answer.results]
        self._seq = answer.seq

    def back(self) -> pb.ApplyRequest:
        """Return the batch that makes ahead() possible again."""
        return self._batch(self._freed())

    def came(self, answer: pb.ApplyResponse) -> None:
        """Take the answer to back()."""
        self._seq = answer.seq

    def _asked(self) -> list[Op]:
        return [
            Allocate(f"request-{i}", REUSED + 1, keys=keys) for i, keys in enumerate(self._keys)
        ]

    def _freed(self) -> list[Op]:
        keep_tokens = REUSED if self._known else 0
        return [Free(handle, End.ABORTED, keep_tokens=keep_tokens) for handle in self._handles]

    def _batch(self, ops: list[Op]) -> pb.ApplyRequest:
        return batch_to(self.pool.numbered(), Batch(self._seq + 1, self._seq, [], ops))
