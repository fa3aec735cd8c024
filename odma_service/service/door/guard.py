"""One guard before every rpc: who calls, how much at once, and whether the message is one.

It refuses with the same details as every other error, also where gRPC's own answer has none:
for an rpc that is not served and for a message that cannot be parsed. What it refuses before the
message is read takes none of the threads that answer calls, nor do health and reflection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple, TypeAlias

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
from odma_service.service.rpc.statuses import abort, status_of

LARGEST_MESSAGE_BYTES = 4 * 1024 * 1024
GUARD_OPTIONS = (
    ("grpc.max_receive_message_length", 2 * LARGEST_MESSAGE_BYTES),  # gRPC itself refuses more
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),  # between the two it is up to chance
    ("grpc.server_handshake_timeout_ms", 10_000),
)
MOST_SILENT = 15
"""Questions for the health whose message has not come; each holds a thread."""
CERTIFICATE_NAMES = ("x509_common_name", "x509_subject_alternative_name")

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Answer = Callable[..., Any]
Parse = Callable[[bytes], Any]

log = structlog.get_logger()


class Calls(ThreadPoolExecutor):
    """The threads that answer calls, and how many calls are with them, waiting ones too."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers, thread_name_prefix="call")
        self._under_way: set[Future[Any]] = set()

    @property
    def count(self) -> int:
        """How many calls are under way."""
        return len(self._under_way)

    def under_way(self) -> set[Future[Any]]:
        """Return the calls under way, to be waited for."""
        return self._under_way.copy()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a call as soon as a thread is free."""
        future = super().submit(fn, *args, **kwargs)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future


class Silent:
    """Calls whose message has not come, each with a thread that waits for it.

    One that is too many costs the oldest its place, so that with one thread more than `most`
    every call is read.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = Lock()
        self._waiting: list[grpc.ServicerContext] = []

    def first(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        """Return a call's message, None if none came."""
        with self._lock:
            self._waiting.append(context)
            for oldest in self._waiting[: -self._most]:
                oldest.cancel()
        try:
            return next(requests, None)
        except grpc.RpcError as gone:
            gone.__traceback__ = None  # for the reason that Streams tells
            return None
        finally:
            with self._lock:
                self._waiting.remove(context)


class _Unusable(NamedTuple):
    """What a message that is none is parsed to.

    Each error is made when it is raised: one that belonged to the message, with a traceback that
    holds the message, would keep the call and its place in the connection until Python looks for
    garbage.
    """

    error: Callable[[], OdmaError]


class Guard(grpc.ServerInterceptor):
    """Lets calls through to their servicers. It is the innermost of the interceptors."""

    def __init__(self, identities: Access | None, calls: Calls, most_calls: int) -> None:
        self._identities = identities
        self._calls = calls
        self._most_calls = most_calls
        self._refusing = ThreadPoolExecutor(1, thread_name_prefix="refuse")
        self._reflecting = ThreadPoolExecutor(2, thread_name_prefix="reflect")
        self._probing = ThreadPoolExecutor(MOST_SILENT + 1, thread_name_prefix="probe")
        self._silent = Silent(MOST_SILENT)
        self._guarded: dict[str, Handler] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Return who answers the call: its servicer, or a refusal."""
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
        """Learn the caller from its certificate, unless its token has told."""
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

    def _refusal(self, error: OdmaError) -> Handler:
        """Return a handler, good for rpcs of every kind, that ends the call at once."""
        error.__traceback__ = None  # or its frames keep the call, until Python looks for garbage

        def refuse(_requests: object, context: grpc.ServicerContext) -> None:
            if isinstance(error, IdentityError):
                log.info("caller refused", peer=context.peer(), reason=str(error))
            abort(context, status_of(error))

        refuse.experimental_thread_pool = self._refusing  # type: ignore[attr-defined]
        return grpc.stream_stream_rpc_method_handler(refuse)

    def _guard(self, rpc: str, handler: Handler) -> Handler:
        """Return `handler` with the checks that need the message or the connection."""
        answer: Any = handler.unary_unary or handler.unary_stream or handler.stream_stream
        form: Any
        guarded: Any
        at_once = getattr(answer, "experimental_non_blocking", False)  # it sends by itself
        own_pool = getattr(answer, "experimental_thread_pool", None)
        if at_once and handler.request_streaming:
            form, guarded = grpc.stream_stream_rpc_method_handler, self._lending(rpc, answer)
        elif handler.request_streaming:  # reflection
            own_pool = own_pool or self._reflecting
            form, guarded = grpc.stream_stream_rpc_method_handler, self._exchanging(rpc, answer)
        elif handler.response_streaming:
            form, guarded = grpc.unary_stream_rpc_method_handler, self._telling(rpc, answer)
        elif access.is_open(rpc):
            form, guarded = grpc.stream_stream_rpc_method_handler, self._probed(answer)
            at_once, own_pool = True, self._probing
        else:
            form, guarded = grpc.unary_unary_rpc_method_handler, self._answering(rpc, answer)
        guarded.experimental_non_blocking = at_once
        guarded.experimental_thread_pool = own_pool
        made: Handler = form(
            guarded, _parser(handler.request_deserializer), handler.response_serializer
        )
        return made

    def _answering(self, rpc: str, answer: Answer) -> Answer:
        def answering(request: Any, context: grpc.ServicerContext) -> Any:
            with _refusing(context):
                self._insist_known(rpc, context)
                _insist_usable(request)
                return answer(request, context)

        return answering

    def _probed(self, answer: Answer) -> Answer:
        """Answer one message, as _answering does, of a caller that may be silent."""

        def probed(requests: Any, context: grpc.ServicerContext, send: Any) -> None:
            request = self._silent.first(requests, context)
            if request is None:
                context.set_code(grpc.StatusCode.CANCELLED)
            else:
                with _refusing(context):
                    _insist_usable(request)
                    send(answer(request, context))
            send(None)

        return probed

    def _telling(self, rpc: str, answer: Answer) -> Answer:
        def telling(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with _refusing(context):
                self._insist_known(rpc, context)
                _insist_usable(request)
                for response in answer(request, context):
                    self._insist_still_known()
                    yield response

        return telling

    def _exchanging(self, rpc: str, answer: Answer) -> Answer:
        def exchanging(requests: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with _refusing(context):
                self._insist_known(rpc, context)
                yield from answer(self._usable(requests), context)

        return exchanging

    def _lending(self, rpc: str, answer: Answer) -> Answer:
        def lending(requests: Any, context: grpc.ServicerContext, send: Any) -> None:
            with _refusing(context):
                self._insist_known(rpc, context)
                answer(self._usable(requests), context, send)

        return lending

    def _usable(self, requests: Iterator[Any]) -> Iterator[Any]:
        """Yield the messages of a stream; raise OdmaError for what is none."""
        for request in requests:
            self._insist_still_known()
            _insist_usable(request)
            yield request


@contextmanager
def _refusing(context: grpc.ServicerContext) -> Iterator[None]:
    """End the call with the status of an error, also of one that a servicer leaves to gRPC."""
    try:
        yield
    except grpc.RpcError as gone:
        gone.__traceback__ = None  # for the reason that Streams tells
    except OdmaError as error:
        abort(context, status_of(error))
    except NotImplementedError:  # by the base class of a servicer
        abort(context, status_of(UnimplementedError("this rpc is not built yet")))


def _insist_usable(request: object) -> None:
    if type(request) is _Unusable:
        raise request.error()


def _parser(parse: Parse | None) -> Parse:
    """Return `parse`, but for what it would refuse: gRPC has only INTERNAL for that."""

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
