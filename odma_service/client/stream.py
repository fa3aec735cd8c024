"""Apply over a stream, in the shape of a stub's method: one attempt, which may time out."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from queue import SimpleQueue
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self, cast

import grpc

from odma_service.errors import UnavailableError
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1.memory_service_pb2_grpc import MemoryServiceStub

LOOK_SECONDS = 0.05
"""How often the clock is looked at: gRPC bounds a stream as a whole, not a single answer."""
ENDED = "the service ended the stream without an answer"


class ApplyStream:
    """A stream that is opened when it is first needed, and again after it broke."""

    def __init__(self, stub: MemoryServiceStub) -> None:
        self._stub = stub
        self._requests: SimpleQueue[pb.StreamRequest | None] = SimpleQueue()
        self._answers: Any = None  # a grpc.Call and an iterator of StreamResponse
        self._give_up: float | None = None
        self._closed = Event()
        self._watch = Thread(target=self._cut_when_late, daemon=True)

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._watch.join()
        self._break()

    def __call__(
        self,
        request: pb.ApplyRequest,
        timeout: float,
        metadata: tuple[tuple[str, str | bytes], ...] | None = None,
    ) -> pb.ApplyResponse:
        """Send a batch and wait for its answer. Raises grpc.RpcError and UnavailableError."""
        if self._answers is None:
            self._requests = SimpleQueue()
            self._answers = self._stub.Stream(iter(self._requests.get, None), metadata=metadata)
        self._requests.put(pb.StreamRequest(apply=request))
        self._give_up = time.monotonic() + timeout
        answer: pb.ApplyResponse | None = None
        try:
            answer = next(self._answers).apply
        except StopIteration:
            raise UnavailableError(ENDED) from None
        finally:
            self._give_up = None
            if answer is None:
                self._break()
        return answer

    def _break(self) -> None:
        """Leave the stream; the next batch opens another."""
        if self._answers is not None:
            self._requests.put(None)
            self._answers.cancel()
            self._answers = None

    def _cut_when_late(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            give_up, answers = self._give_up, self._answers
            if give_up is not None and answers is not None and time.monotonic() > give_up:
                answers.cancel()


class AsyncApplyStream:
    """As ApplyStream: opened when it is first needed, and again after it broke."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub
        self._call: Any = None  # a grpc.aio.StreamStreamCall

    async def __call__(
        self,
        request: pb.ApplyRequest,
        timeout: float,
        metadata: tuple[tuple[str, str], ...] | None = None,
    ) -> pb.ApplyResponse:
        """Send a batch and wait for its answer. Raises grpc.RpcError and UnavailableError."""
        if self._call is None:
            self._call = self._stub.Stream(metadata=metadata)
        answer: pb.StreamResponse | None = None
        try:
            async with asyncio.timeout(timeout):
                answer = await self._exchange(pb.StreamRequest(apply=request))
        except TimeoutError:
            raise _unanswered(f"no answer within {timeout:g} seconds") from None
        finally:
            if answer is None:
                self.close()
        return answer.apply

    async def _exchange(self, request: pb.StreamRequest) -> pb.StreamResponse:
        with suppress(asyncio.InvalidStateError):  # it has ended: read() tells how
            try:
                await self._call.write(request)
            except grpc.RpcError as error:
                # Core does not say why it could not send; another stream will.
                if error.code() is not grpc.StatusCode.INTERNAL:
                    raise
                raise _unanswered("the stream broke") from None
        answer: Any = await self._call.read()
        if answer is grpc.aio.EOF:
            raise UnavailableError(ENDED)
        return cast("pb.StreamResponse", answer)

    def close(self) -> None:
        """Leave the stream; the next batch opens another."""
        if self._call is not None:
            self._call.cancel()
            self._call = None


def _unanswered(why: str) -> grpc.RpcError:
    """Return the failure of a batch that has no answer, to be sent again."""
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing, why)
