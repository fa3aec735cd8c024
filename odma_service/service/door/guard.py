"""The guard of every rpc: it identifies the caller, limits the calls and checks the messages.

A refusal has the same details as every other error, also where gRPC's own answer has none: for
an rpc that is not served and for a message that cannot be parsed. A refusal before the message
is read takes none of the threads that answer calls. Neither do health and reflection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import grpc
import structlog
from google.protobuf.message import DecodeError

from odma_service.errors import (
    BusyError,
    IdentityError,
    InvalidError,
    MessageSizeError,
    OdmaError,
    UnimplementedError,
)
from odma_service.service.door import access
from odma_service.service.door.access import CALLER, Access, Identity
from odma_service.service.door.handlers import CallShape, Handler, Parse, Parts
from odma_service.service.rpc.statuses import abort, status_of
from odma_service.service.watch.lines import Seldom

LARGEST_MESSAGE_BYTES = 4 * 1024 * 1024
GUARD_OPTIONS = (
    ("grpc.max_receive_message_length", 2 * LARGEST_MESSAGE_BYTES),  # gRPC itself refuses more
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),  # between the two it is up to chance
    ("grpc.server_handshake_timeout_ms", 10_000),
)
MOST_SILENT = 15
"""Health checks that may wait for their message; each holds a thread."""
CERTIFICATE_NAMES = ("x509_common_name", "x509_subject_alternative_name")

log = structlog.get_logger()


class Calls(ThreadPoolExecutor):
    """The threads that answer calls, and the calls that they have or will get."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers, thread_name_prefix="call")
        self._under_way: set[Future[Any]] = set()

    @property
    def count(self) -> int:
        """How many calls are under way."""
        return len(self._under_way)

    def under_way(self) -> set[Future[Any]]:
        """Return the calls under way, for a caller that waits for them."""
        return self._under_way.copy()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a call as soon as a thread is free."""
        future = super().submit(fn, *args, **kwargs)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future


class Silent:
    """Calls that wait for their message, each in a thread.

    One call too many costs the oldest its place. So one thread more than `most` is enough to
    read every call.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = Lock()
        self._waiting: list[grpc.ServicerContext] = []

    def first(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        """Return the message of a call, or None if none came."""
        with self._lock:
            self._waiting.append(context)
            for oldest in self._waiting[: -self._most]:
                oldest.cancel()
        try:
            return next(requests, None)
        except grpc.RpcError as gone:
            gone.__traceback__ = None  # or it stays in memory: see Streams
            return None
        finally:
            with self._lock:
                self._waiting.remove(context)


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

    def __init__(self, identities: Access | None, calls: Calls, most_calls: int) -> None:
        self._identities = identities
        self._calls = calls
        self._most_calls = most_calls
        self._refusing = ThreadPoolExecutor(1, thread_name_prefix="refuse")
        self._reflecting = ThreadPoolExecutor(2, thread_name_prefix="reflect")
        self._probing = ThreadPoolExecutor(MOST_SILENT + 1, thread_name_prefix="probe")
        self._silent = Silent(MOST_SILENT)
        self._seldom = Seldom()
        self._guarded: dict[str, Handler] = {}
        self._checks = {
            CallShape.UNARY: _Checks(_insist_usable, _nothing),
            CallShape.SERVER_STREAM: _Checks(_insist_usable, self._insist_still_known),
            CallShape.BOTH_STREAMS: _Checks(self._insist_next, _nothing),
            CallShape.BOTH_BY_CALLBACK: _Checks(self._insist_next, _nothing),
        }

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
            if not access.is_open(rpc):
                self._insist_room()
                self._insist_token(rpc, details.invocation_metadata)
        except OdmaError as error:
            return self._refusal(error)
        return guarded

    def _insist_room(self) -> None:
        if self._calls.count >= self._most_calls:
            raise BusyError(f"{self._most_calls:,} calls (max-calls) are being answered already")

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
        self._admit(rpc, self._identities.by_certificate(decoded))

    def _admit(self, rpc: str, identity: Identity) -> None:
        access.insist_role(rpc, identity)
        CALLER.set(identity)

    def _insist_still_known(self) -> None:
        """Raise IdentityError if the caller of a stream was struck off the token file."""
        caller = CALLER.get()
        if self._identities and caller and not self._identities.knows(caller):
            raise IdentityError("this identity is not known here any more")

    def _insist_next(self, request: object) -> None:
        """Check the next message of a stream. Raises OdmaError."""
        self._insist_still_known()
        _insist_usable(request)

    def _refusal(self, error: OdmaError) -> Handler:
        """Return a handler, good for rpcs of every shape, that ends the call at once."""
        error.__traceback__ = None  # or its frames keep the call, until Python looks for garbage

        def refuse(_requests: object, context: grpc.ServicerContext) -> None:
            if isinstance(error, IdentityError) and (left_out := self._seldom.let()) is not None:
                more = {"others": left_out} if left_out else {}
                log.info("caller refused", peer=context.peer(), reason=str(error), **more)
            abort(context, status_of(error))

        return Parts(CallShape.BOTH_STREAMS, refuse, self._refusing).handler()

    def _guard(self, rpc: str, handler: Handler) -> Handler:
        """Return `handler` with the checks that need the message or the connection."""
        parts = Parts.of(handler)
        guarded = parts.around(partial(self._checked, rpc, self._checks[parts.shape]))
        if parts.shape is CallShape.UNARY and access.is_open(rpc):  # a health check
            guarded = self._by_callback(guarded)
        elif parts.shape is CallShape.BOTH_STREAMS:  # reflection
            guarded = guarded._replace(threads=parts.threads or self._reflecting)
        return guarded._replace(parse=_parser(parts.parse)).handler()

    def _by_callback(self, unary: Parts) -> Parts:
        """Return a unary rpc in a shape that lets its caller be silent."""

        def by_callback(requests: Any, context: grpc.ServicerContext, send: Any) -> None:
            request = self._silent.first(requests, context)
            if request is None:
                context.set_code(grpc.StatusCode.CANCELLED)
            else:
                send(unary.function(request, context))
            send(None)

        return unary._replace(
            shape=CallShape.BOTH_BY_CALLBACK, function=by_callback, threads=self._probing
        )

    @contextmanager
    def _checked(
        self, rpc: str, checks: _Checks, context: grpc.ServicerContext
    ) -> Iterator[_Checks]:
        """Check a call; end it with the status of an error, also of one left to gRPC."""
        try:
            self._insist_known(rpc, context)
            yield checks
        except grpc.RpcError as gone:
            gone.__traceback__ = None  # or it stays in memory: see Streams
        except OdmaError as error:
            abort(context, status_of(error))
        except NotImplementedError:  # by the base class of a servicer
            abort(context, status_of(UnimplementedError("this rpc is not built yet")))


def _nothing() -> None:
    """Check nothing."""


def _insist_usable(request: object) -> None:
    if type(request) is _Unusable:
        raise request.error()


def _parser(parse: Parse | None) -> Parse:
    """Return `parse` with a refusal of ours where gRPC's would be INTERNAL."""

    assert parse is not None  # our rpcs have messages

    def parse_usable(content: bytes) -> Any:
        if len(content) > LARGEST_MESSAGE_BYTES:
            return _Unusable(
                lambda: MessageSizeError(
                    f"the message has {len(content):,} bytes, at most "
                    f"{LARGEST_MESSAGE_BYTES:,} are taken"
                )
            )
        try:
            return parse(content)
        except DecodeError:
            return _Unusable(lambda: InvalidError("message", "the encoding of the rpc's request"))

    return parse_usable
