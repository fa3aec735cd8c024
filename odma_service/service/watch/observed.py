"""A watch on every call, whatever kind of rpc it is: what metrics and traces have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import grpc
from google.protobuf import descriptor_pool

UNKNOWN_RPC = "(unknown)"
GRPC_MARKS = ("experimental_non_blocking", "experimental_thread_pool")
"""What grpcio wants to know of a handler is on its function."""

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]


class Watch(Protocol):
    """Told of one call, in the thread that answers it."""

    def asked(self) -> None:
        """A request is here: that of the call, or the next one of a stream."""

    def answered(self) -> None:
        """An answer is about to be sent."""

    def ended(self, code: grpc.StatusCode) -> None:
        """The call is over; nothing follows."""


class CallObserver(grpc.ServerInterceptor, ABC):
    """Watches calls. Put before other interceptors, it sees what they refuse.

    Neither the wait for a thread nor the network are in what it sees.
    """

    def __init__(self) -> None:
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}

    @abstractmethod
    def watch(self, rpc: str, handler: Handler, context: grpc.ServicerContext) -> Watch:
        """Return who is told of a call that begins. `rpc`: package.Service.Rpc, UNKNOWN_RPC."""

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the handler of a call, watched."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        rpc = _rpc_name(handler_call_details.method)
        known = self._wrapped.get(rpc)
        if known is None or known[0] is not handler:
            known = self._wrapped[rpc] = handler, self._watched(rpc, handler)
        return known[1]

    def _watched(self, rpc: str, handler: Handler) -> Handler:
        """Return a handler that does what `handler` does, watched."""
        kind = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        behaviour = getattr(handler, kind)
        if not handler.response_streaming:
            watched = self._once(rpc, handler, behaviour)
        elif getattr(behaviour, "experimental_non_blocking", False):
            watched = self._by_callback(rpc, handler, behaviour)
        else:
            watched = self._one_by_one(rpc, handler, behaviour)
        for name in GRPC_MARKS:
            if hasattr(behaviour, name):
                setattr(watched, name, getattr(behaviour, name))
        made: Handler = getattr(grpc, f"{kind}_rpc_method_handler")(
            watched,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return made

    def _once(
        self, rpc: str, handler: Handler, behaviour: Callable[..., Any]
    ) -> Callable[..., Any]:
        def once(request: Any, context: grpc.ServicerContext) -> Any:
            with self._watching(rpc, handler, context) as watch:
                answer = behaviour(_telling(watch, request, handler), context)
                watch.answered()
                return answer

        return once

    def _one_by_one(
        self, rpc: str, handler: Handler, behaviour: Callable[..., Any]
    ) -> Callable[..., Any]:
        def one_by_one(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with self._watching(rpc, handler, context) as watch:
                for answer in behaviour(_telling(watch, request, handler), context):
                    watch.answered()
                    yield answer

        return one_by_one

    def _by_callback(
        self, rpc: str, handler: Handler, behaviour: Callable[..., Any]
    ) -> Callable[..., Any]:
        def by_callback(
            request: Any, context: grpc.ServicerContext, send: Callable[[Any], None]
        ) -> None:
            with self._watching(rpc, handler, context) as watch:

                def sending(answer: Any) -> None:
                    if answer is not None:
                        watch.answered()
                    send(answer)

                behaviour(_telling(watch, request, handler), context, sending)

        return by_callback

    @contextmanager
    def _watching(
        self, rpc: str, handler: Handler, context: grpc.ServicerContext
    ) -> Iterator[Watch]:
        watch = self.watch(rpc, handler, context)
        code = grpc.StatusCode.OK
        try:
            yield watch
        except GeneratorExit:
            code = grpc.StatusCode.CANCELLED
            raise
        except BaseException:
            code = grpc.StatusCode.UNKNOWN
            raise
        finally:
            watch.ended(context.code() or code)  # type: ignore[attr-defined]


def _telling(watch: Watch, request: Any, handler: Handler) -> Any:
    """Tell of a request, or of each of a stream when it comes."""
    if handler.request_streaming:
        return _telling_each(watch, request)
    watch.asked()
    return request


def _telling_each(watch: Watch, requests: Iterable[Any]) -> Iterator[Any]:
    for request in requests:
        watch.asked()
        yield request


def _rpc_name(method: str) -> str:
    """Return service.rpc of a path that is served; others have one name together."""
    name = method.strip("/").replace("/", ".")
    try:
        descriptor_pool.Default().FindMethodByName(name)
    except KeyError:
        return UNKNOWN_RPC
    return name
