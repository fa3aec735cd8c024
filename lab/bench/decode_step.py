"""A decode step that can be repeated without end: the same operations and the same two copies.

The pool is laid out so that nothing else can happen. A region in front has two walls behind it
and a hole behind them: it grows by sliding both. Others have a hole each and grow in place.
Those at the end lie close together: what is freed there is allocated again. A second batch
brings everything back to where it was.

    | front | wall | wall | hole | grows | hole | grows | hole | ... | tail | tail | ... |
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.bench.building import BenchError
from odma_service.client import Client
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.values import (
    Allocate,
    Batch,
    End,
    Extend,
    Free,
    Moves,
    Op,
    Place,
    PlaneGroup,
    PolicyChange,
    Trim,
    Used,
)
from odma_service.wire import batch_to

USED = 60
COPIES = 2
STEP, FRONT, WALL, GROWS, TAIL = 64, 512, 128, 256, 192
"""Tokens: by how much a region grows, and how long they are before that."""

WRITTEN = {FRONT: FRONT, WALL: 100, GROWS: GROWS, TAIL: 150}
PLANES = [PlaneGroup(count=56, bytes_per_token=1024)]
TEXT = "Explain in two or three sentences why the sky is blue at noon and red in the evening. " * 3


class DecodeStep:
    """A pool of its own with 60 regions, and the batches of a step with so many operations.

    `predicted` asks for a prediction for every allocation; the places stay the same.
    """

    def __init__(self, service: Client, name: str, operations: int, *, predicted: bool) -> None:
        renewed = operations // 8  # freed, and as many allocated
        growing = USED - 3 - renewed
        self._grown = operations - 1 - 2 * renewed
        if not 0 <= self._grown <= growing:
            raise BenchError(f"a step of {operations} operations does not fit {USED} regions")
        lengths = [FRONT, WALL, WALL, STEP, *[GROWS, STEP] * growing, *[TAIL] * renewed]
        self._predicted = predicted
        self._serial = 0
        self.pool = service.open_pool(
            name,
            moves=Moves.ANY,
            planes=PLANES,
            capacity_tokens=sum(lengths),
            model_length_tokens=1024,
            single_ordered_stream=True,
            copies_may_overlap=True,
            policy=PolicyChange(
                name="elastic",
                step_tokens=STEP,
                safety_share=0,
                unsure_ratio=2.0 if predicted else 0.0,
            ),
        )
        self._seq = 0
        self._held: dict[int, list[int]] = {FRONT: [], WALL: [], GROWS: [], TAIL: [], STEP: []}
        answer = self.pool.apply(ops=[self._new(length) for length in lengths])
        for length, result in zip(lengths, answer.results, strict=True):
            assert isinstance(result, Place)
            self._held[length].append(result.handle)
        self.pool.apply(ops=[Free(handle, End.ABORTED) for handle in self._held.pop(STEP)])
        self._seq = self.pool.seq

    def ahead(self) -> pb.ApplyRequest:
        """Return the batch that is to be timed."""
        tail, (front,) = self._held[TAIL], self._held[FRONT]
        return self._batch(
            [
                *(Free(handle, End.FINISHED, 40) for handle in tail),
                Extend(front, FRONT + 1, FRONT + STEP),
                *(Extend(h, GROWS + 1, GROWS + STEP) for h in self._held[GROWS][: self._grown]),
                *(self._new(TAIL) for _ in tail),
            ]
        )

    def went(self, answer: pb.ApplyResponse) -> None:
        """Take the answer to ahead(). Raises BenchError if it was another step."""
        self._insist(answer, copies=COPIES)
        new = len(self._held[TAIL])
        self._held[TAIL] = _handles(answer.results[len(answer.results) - new :])

    def back(self) -> pb.ApplyRequest:
        """Return the batch that makes ahead() possible again."""
        grown = self._held[GROWS][: self._grown]
        return self._batch(
            [
                *(Trim(handle, GROWS) for handle in grown),
                Trim(self._held[FRONT][0], FRONT),
                *(Free(handle, End.ABORTED) for handle in self._held[WALL]),
                *(self._new(WALL) for _ in self._held[WALL]),
            ]
        )

    def came(self, answer: pb.ApplyResponse) -> None:
        """Take the answer to back()."""
        self._insist(answer, copies=0)
        self._held[WALL] = _handles(answer.results[-2:])

    def _new(self, length: int) -> Op:
        """Ask for a region of exactly this length."""
        self._serial += 1
        shortest = length == STEP
        return Allocate(
            f"request-{self._serial}",
            1 if shortest else length - STEP,
            max_total_tokens=STEP if shortest else None,
            text=f"{self._serial}. {TEXT}" if self._predicted else None,  # never the same twice
        )

    def _batch(self, ops: list[Op]) -> pb.ApplyRequest:
        used = [
            Used(handle, WRITTEN[length])
            for length, handles in self._held.items()
            for handle in handles
        ]
        return batch_to(self.pool.numbered(), Batch(self._seq + 1, self._seq, used, ops))

    def _insist(self, answer: pb.ApplyResponse, copies: int) -> None:
        refused = any(result.HasField("refusal") for result in answer.results)
        if refused or len(answer.copies) != copies:
            raise BenchError(f"the step is not what it should be: {answer}")
        self._seq = answer.seq


def _handles(results: Sequence[pb.Result]) -> list[int]:
    return [result.place.handle for result in results]
