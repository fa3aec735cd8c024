"""Stream: batches of one pool in lock-step, on a thread of the stream's own.

grpcio gives a stream one of the threads that answer calls, for as long as the client likes. So
streams have threads of their own, a bounded number, and no stream takes one from a call. The
handler sends by callback: so another thread can end a stream that waits for its client.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from threading import Event, Lock

import grpc
from grpc_status import rpc_status

from odma_service.errors import (
    IdentityError,
    InvalidError,
    StreamLimitError,
    StreamReplacedError,
)
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.service.door.access import CALLER, STILL_KNOWN
from odma_service.service.door.handlers import OwnThreads
from odma_service.service.rpc.statuses import told

END_SECONDS = 1.0
"""A stream that is to end has so long for its batch, and its client to take an answer."""

Send = Callable[[pb.StreamResponse | None], None]


class Stream:
    """One stream. Its lock is held from the arrival of a request until its answer is sent."""

    def __init__(self, context: grpc.ServicerContext, send: Send) -> None:
        self.lock = Lock()
        self.pool = ""  # none yet
        self.ended = False
        caller = CALLER.get()
        self.caller: Hashable = caller.who if caller else context.peer()
        self.known = STILL_KNOWN.get()
        self.gone = Event()
        """Its client, or the whole connection. To ask gRPC takes a lock, for each batch."""
        if not context.add_callback(self.gone.set):
            self.gone.set()
        self._context = context
        self._send = send

    def is_wanted(self) -> bool:
        """Return whether somebody waits for an answer."""
        return not self.gone.is_set()

    def answer(self, answer: pb.ApplyResponse) -> None:
        """Send an answer; wait until the client takes it."""
        self._send(pb.StreamResponse(apply=answer))

    def end(self, error: Exception | None = None, seconds: float = END_SECONDS) -> None:
        """End the stream after the batch under way; cut it if that takes longer."""
        if not self.lock.acquire(timeout=max(seconds, 0.0)):
            self._context.cancel()
            return
        try:
            if self.ended:
                return
            self.ended = True
            if error is not None:
                status = rpc_status.to_status(told(error, "Stream"))
                self._context.set_code(status.code)
                self._context.set_details(status.details)
                self._context.set_trailing_metadata(status.trailing_metadata)
            self._send(None)
        finally:
            self.lock.release()


class Streams(OwnThreads):
    """The open streams, and the handler of the rpc."""

    experimental_non_blocking = True

    def __init__(
        self,
        apply: Callable[[pb.ApplyRequest, Callable[[], bool]], pb.ApplyResponse],
        most_streams: int,
    ) -> None:
        # Streams that make way keep their threads until their clients have heard of it.
        super().__init__(2 * most_streams, "stream")
        self._apply = apply
        self._most_streams = most_streams
        self._most_unbound = max(1, most_streams // 4)
        self._lock = Lock()
        self._open: dict[Stream, None] = {}  # oldest first
        self._by_pool: dict[str, Stream] = {}

    def __call__(
        self, requests: Iterator[pb.StreamRequest], context: grpc.ServicerContext, send: Send
    ) -> None:
        stream = Stream(context, send)
        enough = StreamLimitError(f"all {self._most_streams} streams are open; use Apply")
        if not self._enter(stream, enough):
            stream.end(enough)
            return
        try:
            self._serve(stream, requests)
            stream.end()
        except grpc.RpcError as gone:
            # The client is gone. grpcio keeps the error in a cycle with the call: the call and its
            # place in the connection would stay until Python looks for garbage.
            gone.__traceback__ = None
        except Exception as error:  # noqa: BLE001  the client gets it, and the log
            stream.end(error)
        finally:
            self._leave(stream)

    def end_all(self, error: Exception) -> None:
        """End every stream with `error`, after the batch under way."""
        give_up = time.monotonic() + END_SECONDS
        for stream in list(self._open):
            stream.end(error, give_up - time.monotonic())

    def _serve(self, stream: Stream, requests: Iterator[pb.StreamRequest]) -> None:
        for request in requests:
            with stream.lock:
                if stream.ended:
                    return
                name = request.apply.pool.name
                if stream.pool not in ("", name):
                    raise InvalidError("apply.pool.name", "that of the stream's first batch")
                answer = self._apply(request.apply, stream.is_wanted)
                stream.pool = name
                if not answer.replayed:  # one that is repeated late takes no other's place
                    self._bind(stream)
                stream.answer(answer)

    def sweep(self) -> int:
        """End the streams of callers that were struck off the token file too."""
        for stream in list(self._open):
            if not stream.known():
                stream.end(IdentityError("this token or certificate is not known any more"), 0.0)
        return super().sweep()

    def _enter(self, stream: Stream, enough: StreamLimitError) -> bool:
        """Let a stream in; one without a batch makes way if there are too many."""
        with self._lock:
            unbound = [one for one in self._open if not one.pool]
            counts = Counter(one.caller for one in unbound)
            full = len(self._open) >= self._most_streams
            if full or counts[stream.caller] >= self._most_unbound:
                if not unbound:
                    return False
                greediest = stream.caller if not full else counts.most_common(1)[0][0]
                oldest = next(one for one in unbound if one.caller == greediest)
                del self._open[oldest]
            else:
                oldest = None
            self._open[stream] = None
        if oldest:
            oldest.end(enough, 0.0)
        return True

    def _bind(self, stream: Stream) -> None:
        """Make this the stream of its pool, after the pool has taken a batch of it."""
        if self._by_pool.get(stream.pool) is stream:
            return
        with self._lock:
            older = self._by_pool.get(stream.pool)
            self._by_pool[stream.pool] = stream
        if older:
            older.end(StreamReplacedError(stream.pool))

    def _leave(self, stream: Stream) -> None:
        with self._lock:
            self._open.pop(stream, None)
            if self._by_pool.get(stream.pool) is stream:
                del self._by_pool[stream.pool]
