"""A network between clients and the service that delays, repeats and reorders messages.

It stands on loopback and passes every rpc on as bytes. For each message of MemoryService a `Fate`
is chosen, by order or by chance; it may be delivered (again) at any later time.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from queue import SimpleQueue
from random import Random
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc

from odma_service import errors
from odma_service.client.channel import CHANNEL_OPTIONS
from odma_service.service.rpc.statuses import abort, status_of

THREADS = 64
TIMEOUT_SECONDS = 5.0  # of what is delivered late
MEMORY = "/odma.v1.MemoryService/"
STREAM = MEMORY + "Stream"
WATCH = "/odma.v1.PoolService/Watch"

Headers = tuple[tuple[str, str | bytes], ...]


class Fate(Enum):
    """What becomes of a message."""

    PASS = "pass"
    HOLD = "hold"  # the caller is told UNAVAILABLE, the message may come later
    LOSE_ANSWER = "lose_answer"  # it is done, the caller is told UNAVAILABLE
    BUSY = "busy"  # it is lost, the caller is told that there is no room: so are the next two
    CALLER_LIMIT = "caller_limit"
    STREAM_LIMIT = "stream_limit"


NO_ROOM = {
    Fate.BUSY: errors.BusyError("too many calls at once"),
    Fate.CALLER_LIMIT: errors.CallerLimitError("too many calls of this caller"),
    Fate.STREAM_LIMIT: errors.StreamLimitError("too many streams"),
}


class Message(NamedTuple):
    """One message on its way to the service."""

    method: str
    body: bytes
    headers: Headers
    call: Any  # sends it

    @property
    def rpc(self) -> str:
        """Its name, as "Apply". One of a stream is a "Stream"."""
        return self.method.rpartition("/")[2]

    def deliver(self) -> tuple[grpc.StatusCode, bytes]:
        """Have the service do it, now, and return what it says. Nobody hears the answer."""
        how: dict[str, Any] = {"timeout": TIMEOUT_SECONDS, "metadata": self.headers}
        try:
            if self.method == STREAM:
                call = self.call(iter([self.body]), **how)
                answer = next(call)
                call.cancel()
            else:
                answer = self.call(self.body, **how)
        except grpc.RpcError as error:
            return error.code(), (error.details() or "").encode()
        return grpc.StatusCode.OK, answer


Chooser = Callable[[Message], Fate]


class Proxy(grpc.GenericRpcHandler):
    """The network. `choose` decides; without it order() does, and all messages are kept."""

    def __init__(self, target: str, choose: Chooser | None = None) -> None:
        self._choose = choose or self._told
        self._orders: dict[str, list[Fate]] = defaultdict(list)
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self.sent: list[Message] = []
        self.held: list[Message] = []
        self.passed: list[Message] = []
        self._server = grpc.server(
            ThreadPoolExecutor(THREADS), handlers=[self], options=[("grpc.so_reuseport", 0)]
        )
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every call."""
        self._server.stop(None).wait()
        self._channel.close()

    def order(self, rpc: str, *fates: Fate) -> None:
        """Say what becomes of the next messages of an rpc; those after them pass."""
        self._orders[rpc] += fates

    def _told(self, message: Message) -> Fate:
        orders = self._orders[message.rpc]
        fate = orders.pop(0) if orders else Fate.PASS
        self.sent.append(message)
        if fate not in NO_ROOM:
            (self.held if fate is Fate.HOLD else self.passed).append(message)
        return fate

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return what passes a call on."""
        method = details.method
        if method == STREAM:
            return grpc.stream_stream_rpc_method_handler(self._stream)
        if method == WATCH:
            watch: Any = self._channel.unary_stream(method)
            return grpc.unary_stream_rpc_method_handler(
                lambda request, context: _all(watch, request, context)
            )
        call: Any = self._channel.unary_unary(method)
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._unary(method, call, request, context)
        )

    def _fate(self, message: Message) -> Fate:
        if not message.method.startswith(MEMORY):
            return Fate.PASS
        return self._choose(message)

    def _unary(self, method: str, call: Any, body: bytes, context: grpc.ServicerContext) -> bytes:
        message = Message(method, body, _headers(context), call)
        fate = self._fate(message)
        _refuse(context, fate)
        try:
            answer: bytes = call(body, timeout=_left(context), metadata=message.headers)
        except grpc.RpcError as error:
            if fate is Fate.LOSE_ANSWER:
                _lose(context)
            _fail(context, error)
        if fate is Fate.LOSE_ANSWER:
            _lose(context)
        return answer

    def _stream(self, bodies: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        headers = _headers(context)
        call: Any = self._channel.stream_stream(STREAM)
        queue: SimpleQueue[bytes | None] = SimpleQueue()
        answers: Any = call(iter(queue.get, None), metadata=headers)
        context.add_callback(answers.cancel)
        try:
            for body in bodies:
                fate = self._fate(Message(STREAM, body, headers, call))
                _refuse(context, fate)
                queue.put(body)
                answer = next(answers)
                if fate is Fate.LOSE_ANSWER:
                    _lose(context)
                yield answer
        except StopIteration:
            return
        except grpc.RpcError as error:
            _fail(context, error)
        finally:
            queue.put(None)
            answers.cancel()


class Weather:
    """Fates by chance, and messages that are delivered late, some of them twice.

    About one message in `rarity` is delayed, one repeated, one has its answer lost.
    """

    def __init__(self, seed: int, rarity: int = 40, most_seconds: float = 0.5) -> None:
        self._random = Random(seed)
        self._rarity = rarity
        self._most_seconds = most_seconds
        self._lock = threading.Lock()
        self._late: list[tuple[float, Message]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._deliver, daemon=True)
        self.counts: Counter[str] = Counter(delayed=0, repeated=0, answers_lost=0, delivered_late=0)
        self._thread.start()

    def choose(self, message: Message) -> Fate:
        """Say what becomes of a message."""
        with self._lock:
            chance = self._random.randrange(self._rarity)
            if chance > 2:
                return Fate.PASS
            what = ("delayed", "repeated", "answers_lost")[chance]
            self.counts[what] += 1
            if what != "answers_lost":
                due = time.monotonic() + self._random.uniform(0, self._most_seconds)
                self._late.append((due, message))
            return (Fate.HOLD, Fate.PASS, Fate.LOSE_ANSWER)[chance]

    def close(self) -> None:
        """Deliver nothing any more."""
        self._over.set()
        self._thread.join()

    def _deliver(self) -> None:
        """Deliver what is due, the latest sent first."""
        while not self._over.wait(0.01):
            with self._lock:
                due = [one for one in self._late if one[0] <= time.monotonic()]
                self._late = [one for one in self._late if one not in due]
            for _, message in reversed(due):
                message.deliver()
                self.counts["delivered_late"] += 1


def _left(context: grpc.ServicerContext) -> float:
    return min(context.time_remaining() or TIMEOUT_SECONDS, TIMEOUT_SECONDS)


def _headers(context: grpc.ServicerContext) -> Headers:
    return tuple(
        (key, value) for key, value in context.invocation_metadata() if key != "user-agent"
    )


def _all(call: Any, body: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    answers = call(body, metadata=_headers(context))
    context.add_callback(answers.cancel)
    try:
        yield from answers
    except grpc.RpcError as error:
        _fail(context, error)


def _refuse(context: grpc.ServicerContext, fate: Fate) -> None:
    """End a call whose message does not get to the service."""
    if fate is Fate.HOLD:
        _lose(context)
    if fate in NO_ROOM:
        abort(context, status_of(NO_ROOM[fate]))


def _lose(context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.UNAVAILABLE, "the network lost it")


def _fail(context: grpc.ServicerContext, error: Any) -> None:
    context.set_trailing_metadata(error.trailing_metadata() or ())
    context.abort(error.code(), error.details())
