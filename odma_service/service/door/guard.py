"""The guard of every rpc: it identifies the caller, limits the calls and checks the messages.

A refusal has the same details as every other error, also where gRPC's own answer has none: for
an rpc that is not served and for a message that cannot be parsed. A refusal before the message
is read takes none of the threads that answer calls. Neither do the calls of open services, whose
callers are not known: they have threads and places of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import BoundedSemaphore
from typing import Any, NamedTuple, cast

import grpc
import structlog
from google.protobuf.message import DecodeError

from odma_service.errors import (
    BusyError,
    CallerLimitError,
    IdentityError,
    InvalidError,
    MessageSizeError,
    OdmaError,
    StreamLimitError,
    UnimplementedError,
)
from odma_service.service.door import access
from odma_service.service.door.access import CALLER, STILL_KNOWN, Access, Identity
from odma_service.service.door.calls import Busy, Calls, Connections, Pace, hear
from odma_service.service.door.handlers import CallShape, Function, Handler, Parse, Parts
from odma_service.service.door.unread import Unread
from odma_service.service.rpc.statuses import abort, status_of
from odma_service.service.watch.lines import Seldom

LARGEST_MESSAGE_BYTES = 4 * 1024 * 1024
GUARD_OPTIONS = (
    ("grpc.max_receive_message_length", 2 * LARGEST_MESSAGE_BYTES),  # gRPC itself refuses more
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),  # between the two it is up to chance
    ("grpc.server_handshake_timeout_ms", 10_000),
)
LARGEST_OPEN_MESSAGE_BYTES = 1024
"""Nobody is known who sends it; a name of a service is short."""

STRANGERS = 16
"""Threads for health checks, and as many for reflection."""
MOST_STRANGERS = 256
"""Calls of open services answered or waiting at once, of each kind."""
MOST_HEALTH_WATCHERS = 256

READERS = 16
"""Threads of calls that only read; so many of them are answered at once:"""
READING = 2
READ_SHARE, READ_BURST_SECONDS, READ_CALL_SECONDS = 0.1, 0.1, 0.0005
"""The pace of a caller that reads while others work: see Pace."""
READS = frozenset(
    {
        "/odma.v1.PoolService/ListPools",
        "/odma.v1.PoolService/GetPool",
        "/odma.v1.PoolService/ListRegions",
        "/odma.v1.PredictorService/Predict",
        "/odma.v1.EmulatorService/EstimateAccess",
    }
)
CERTIFICATE_NAMES = ("x509_common_name", "x509_subject_alternative_name")

log = structlog.get_logger()


class Pools(NamedTuple):
    """Threads for calls: of known callers, of those that only read, and of strangers."""

    calls: Calls
    reading: Calls
    strangers: Calls
    watching: Calls
    """Those of strangers that watch the health."""
    reflecting: Calls
    busy: Busy
    connections: Connections

    @classmethod
    def of(cls, workers: int) -> Pools:
        """Make them. `workers`: threads for calls of known callers."""
        busy = Busy()
        pace = Pace(READ_SHARE, READ_BURST_SECONDS, READ_CALL_SECONDS, busy.with_others)
        connections = Connections()
        return cls(
            Calls(workers, max(1, workers // 2), connections=connections),
            Calls(READERS, READERS // 2, name="read", pace=pace, connections=connections),
            Calls(STRANGERS, STRANGERS // 2, name="stranger"),
            Calls(MOST_HEALTH_WATCHERS, name="health"),
            Calls(STRANGERS, STRANGERS // 2, name="reflect"),
            busy,
            connections,
        )

    def sweep(self) -> int:
        """Sweep all: see Calls."""
        return sum(pool.sweep() for pool in self[:-2])

    def close(self) -> None:
        """Give the threads back, after the server has stopped."""
        for pool in self[:-2]:
            pool.shutdown()


class _Unusable(NamedTuple):
    """Stands for a message that cannot be used.

    Its error is made anew for each raise. An error kept here would get a traceback that refers
    to this object: a cycle, which keeps the call and its place in the connection until Python
    looks for garbage.
    """

    error: Callable[[], OdmaError]


class _Checks(NamedTuple):
    """The checks of each request and of each response, for one shape of handlers."""

    asked: Callable[[Any], None]
    answered: Callable[[], None]


class Guard(grpc.ServerInterceptor):
    """Lets calls through to their servicers. It has to be the innermost of the interceptors."""

    def __init__(
        self,
        identities: Access | None,
        pools: Pools,
        most_calls: int,
        refused: Callable[[str], object] = lambda _: None,
    ) -> None:
        """`refused` learns the reason of each call that is refused here."""
        self._refused = refused
        self._identities = identities
        self._pools = pools
        self._most_calls = most_calls
        self._refusing = ThreadPoolExecutor(1, thread_name_prefix="refuse")
        self._unread = Unread()
        self._reading = BoundedSemaphore(READING)
        self._seldom = Seldom()
        self._guarded: dict[str, Handler] = {}
        self._threads: dict[str, Calls] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Return the guarded handler of the call's servicer, or a refusal."""
        rpc = details.method
        try:
            guarded = self._guarded.get(rpc)
            if guarded is None:
                handler = continuation(details)
                if handler is None:
                    raise UnimplementedError("the service has no such rpc, or it is switched off")
                guarded = self._guarded[rpc] = self._guard(rpc, handler)
            if access.is_open(rpc):
                self._insist_open_room(rpc)
            else:
                self._insist_token(rpc, details.invocation_metadata)
                self._insist_room(rpc)
        except OdmaError as error:
            return self._refusal(rpc, error)
        return guarded

    def _insist_open_room(self, rpc: str) -> None:
        pool = self._threads[rpc]
        if pool is self._pools.watching:
            if pool.count >= MOST_HEALTH_WATCHERS:
                raise StreamLimitError(
                    f"all {MOST_HEALTH_WATCHERS} watchers of the health are there"
                )
        elif pool.count >= MOST_STRANGERS:
            raise BusyError(f"{MOST_STRANGERS} calls of callers without a name are waiting already")

    def _insist_room(self, rpc: str) -> None:
        if self._threads[rpc].count >= self._most_calls:
            raise BusyError(f"{self._most_calls:,} calls (max-calls) are being answered already")
        if identity := CALLER.get():
            self._insist_share(rpc, identity)

    def _insist_share(self, rpc: str, identity: Identity, counted: int = 0) -> None:
        """Raise CallerLimitError if a caller has its share of calls, beside those `counted`."""
        most = max(1, self._most_calls // 2)
        if self._threads[rpc].count_of(identity.who) - counted >= most:
            raise CallerLimitError(f"{most:,} calls of this caller are being answered already")

    def _open_pool(self, rpc: str) -> Calls:
        """Return the threads of an open rpc."""
        if rpc == "/grpc.health.v1.Health/Watch":
            return self._pools.watching
        health = rpc.startswith("/grpc.health.")
        return self._pools.strangers if health else self._pools.reflecting

    def _insist_token(self, rpc: str, metadata: Any) -> None:
        """Learn the caller from its token. Without one its certificate is asked for later."""
        if self._identities is None:
            return
        for key, value in metadata:
            if key == "authorization":
                self._admit(rpc, self._identities.by_token(value))
                return
        if not self._identities.takes_certificates:
            raise IdentityError("send 'authorization: Bearer TOKEN'")

    def _insist_known(self, rpc: str, context: grpc.ServicerContext) -> None:
        """Learn the caller from its certificate, unless it has shown a token."""
        if self._identities is None or CALLER.get() is not None or access.is_open(rpc):
            return
        shown: Any = context.auth_context()
        names = (name for kind in CERTIFICATE_NAMES for name in shown.get(kind, ()))
        decoded = [name.decode(errors="replace") for name in names]
        identity = self._identities.by_certificate(decoded)
        self._admit(rpc, identity)
        self._pools.connections.note(context.peer(), identity.who)
        self._insist_share(rpc, identity, counted=1)

    def _admit(self, rpc: str, identity: Identity) -> None:
        access.insist_role(rpc, identity)
        CALLER.set(identity)
        if self._identities:
            STILL_KNOWN.set(partial(self._identities.knows, identity))

    def _one_of_few(self, function: Function) -> Function:
        def answering(request: Any, context: grpc.ServicerContext) -> Any:
            with self._reading:
                return function(request, context)

        return answering

    def _refusal(self, rpc: str, error: OdmaError) -> Handler:
        """Return a handler, good for rpcs of every shape, that ends the call at once."""
        error.__traceback__ = None  # or its frames keep the call, until Python looks for garbage
        self._refused(error.reason)

        def refuse(_requests: object, context: grpc.ServicerContext) -> None:
            if isinstance(error, IdentityError) and (left_out := self._seldom.let()) is not None:
                more = {"others": left_out} if left_out else {}
                peer = context.peer()
                log.info("caller refused", rpc=rpc, peer=peer, reason=str(error), **more)
            abort(context, status_of(error))

        return Parts(CallShape.BOTH_STREAMS, refuse, self._refusing).handler()

    def _guard(self, rpc: str, handler: Handler) -> Handler:
        """Return `handler` with the checks that need the message or the connection."""
        parts = Parts.of(handler)
        largest = LARGEST_MESSAGE_BYTES
        if access.is_open(rpc):
            largest = LARGEST_OPEN_MESSAGE_BYTES
            parts = parts._replace(threads=self._open_pool(rpc))
        elif rpc in READS:
            parts = parts._replace(
                threads=self._pools.reading, function=self._one_of_few(parts.function)
            )
        self._threads[rpc] = threads = cast("Calls", parts.threads or self._pools.calls)
        parts = parts._replace(threads=threads)
        engines = not access.is_open(rpc) and rpc not in READS  # those who read give way to them
        checks = _checks(parts.shape, self._pools.busy.hear if engines else hear)
        guarded = parts.around(partial(_Guarded, self, rpc, checks))
        if parts.shape is CallShape.UNARY and parts.serialise:
            guarded = guarded._replace(serialise=self._unread.counting(parts.serialise))
        return guarded._replace(parse=_parser(parts.parse, largest)).handler()

    def begin(self, rpc: str, context: grpc.ServicerContext) -> None:
        """Check what is known of a call that has a thread. Raises OdmaError."""
        self._insist_known(rpc, context)
        self._unread.insist_room(context)

    def end(self, context: grpc.ServicerContext, error: BaseException) -> None:
        """End a call with the status of an error, also of one left to gRPC."""
        if isinstance(error, OdmaError):
            self._refused(error.reason)
            abort(context, status_of(error))
        if isinstance(error, NotImplementedError):  # by the base class of a servicer
            abort(context, status_of(UnimplementedError("this rpc is not built yet")))


class _Guarded:
    """A call, checked: the context in which it is answered."""

    __slots__ = ("_checks", "_context", "_guard", "_rpc")

    def __init__(
        self, guard: Guard, rpc: str, checks: _Checks, context: grpc.ServicerContext
    ) -> None:
        self._guard = guard
        self._rpc = rpc
        self._checks = checks
        self._context = context

    def __enter__(self) -> _Checks:
        try:
            self._guard.begin(self._rpc, self._context)
        except OdmaError as error:
            self._guard.end(self._context, error)
        return self._checks

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, grpc.RpcError):
            error.__traceback__ = None  # or it stays in memory: see Streams
            return True
        if error is not None:
            self._guard.end(self._context, error)
        return False


def _checks(shape: CallShape, hear: Callable[[], None]) -> _Checks:
    """Return the checks for handlers of a shape. `hear` learns that a message has come."""

    def insist_usable(request: object) -> None:
        hear()
        if type(request) is _Unusable:
            raise request.error()

    def insist_next(request: object) -> None:
        access.insist_still_known()
        hear()
        if type(request) is _Unusable:
            raise request.error()

    one_request = shape in (CallShape.UNARY, CallShape.SERVER_STREAM)
    return _Checks(
        insist_usable if one_request else insist_next,
        access.insist_still_known if shape is CallShape.SERVER_STREAM else _nothing,
    )


def _nothing() -> None:
    """Check nothing."""


def _parser(parse: Parse | None, largest: int) -> Parse:
    """Return `parse` with a refusal of ours where gRPC's would be INTERNAL."""

    assert parse is not None  # our rpcs have messages

    def parse_usable(content: bytes) -> Any:
        if len(content) > largest:
            return _Unusable(
                lambda: MessageSizeError(
                    f"the message has {len(content):,} bytes, at most {largest:,} are taken"
                )
            )
        try:
            return parse(content)
        except DecodeError:
            return _Unusable(lambda: InvalidError("message", "the encoding of the rpc's request"))

    return parse_usable
