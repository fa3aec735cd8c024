"""The shapes of gRPC handlers and grpcio's marks on them; no other module knows either.

A handler is a function with the two that parse and serialise its messages. Its shape says how
grpcio calls the function:

    UNARY             function(request, context) -> response
    SERVER_STREAM     function(request, context) -> responses
    BOTH_STREAMS      function(requests, context) -> responses
    BOTH_BY_CALLBACK  function(requests, context, send); send(None) ends the call

Two attributes of the function are grpcio's marks: `experimental_non_blocking` for a function that
sends by callback, `experimental_thread_pool` for threads other than the server's. A method of a
servicer cannot bear marks of its own. So an rpc with threads of its own is a callable object
(OwnThreads), which the servicer returns from a property named as the rpc.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from enum import Enum
from typing import Any, NamedTuple, Protocol, TypeAlias

import grpc

from odma_service.service.door.calls import Calls

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Function = Callable[..., Any]
Parse = Callable[[bytes], Any]


class CallShape(Enum):
    """Whether requests are a stream, whether responses are, whether they are sent by callback."""

    UNARY = (False, False, False)
    SERVER_STREAM = (False, True, False)
    BOTH_STREAMS = (True, True, False)
    BOTH_BY_CALLBACK = (True, True, True)


class Steps(Protocol):
    """Learns the steps of a call, in the thread that answers it. An error of it ends the call."""

    def asked(self, request: Any) -> object:
        """Take note of a request: that of the call, or the next one of a stream."""

    def answered(self) -> object:
        """Take note that a response is about to be sent."""


Around = Callable[[grpc.ServicerContext], AbstractContextManager[Steps]]
"""Makes the context in which a call is answered."""


class OwnThreads:
    """A handler that is an object, called by grpcio in threads that serve no other rpc."""

    experimental_non_blocking = False

    def __init__(self, most_calls: int, name: str) -> None:
        # One thread more than calls: it refuses those that are too many.
        self.experimental_thread_pool = Calls(most_calls + 1, name=name)

    def sweep(self) -> int:
        """Cut calls whose message does not come, while others wait. Returns how many."""
        return self.experimental_thread_pool.sweep()

    def close(self) -> None:
        """Give the threads back, after the server has stopped."""
        self.experimental_thread_pool.shutdown()


class Parts(NamedTuple):
    """A handler taken apart. Without threads of its own it runs in the server's."""

    shape: CallShape
    function: Function
    threads: ThreadPoolExecutor | None = None
    parse: Parse | None = None
    serialise: Callable[[Any], bytes] | None = None

    @classmethod
    def of(cls, handler: Handler) -> Parts:
        """Take a handler apart. Raises ValueError for a shape that no rpc of ours has."""
        function: Any = handler.unary_unary or handler.unary_stream or handler.stream_stream
        by_callback = getattr(function, "experimental_non_blocking", False)
        return cls(
            CallShape((handler.request_streaming, handler.response_streaming, by_callback)),
            function,
            getattr(function, "experimental_thread_pool", None),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def around(self, around: Around) -> Parts:
        """Return parts of the same shape, with every call inside the context of `around`."""
        return self._replace(function=_WRAPPERS[self.shape](self.function, around))

    def handler(self) -> Handler:
        """Put the parts together. Marks the function, which is to be of no other handler."""
        function: Any = self.function
        function.experimental_non_blocking = self.shape is CallShape.BOTH_BY_CALLBACK
        function.experimental_thread_pool = self.threads
        made: Handler = _MAKERS[self.shape](function, self.parse, self.serialise)
        return made


_MAKERS: dict[CallShape, Callable[..., Any]] = {
    CallShape.UNARY: grpc.unary_unary_rpc_method_handler,
    CallShape.SERVER_STREAM: grpc.unary_stream_rpc_method_handler,
    CallShape.BOTH_STREAMS: grpc.stream_stream_rpc_method_handler,
    CallShape.BOTH_BY_CALLBACK: grpc.stream_stream_rpc_method_handler,
}


def _unary(function: Function, around: Around) -> Function:
    def unary(request: Any, context: grpc.ServicerContext) -> Any:
        with around(context) as steps:
            steps.asked(request)
            response = function(request, context)
            steps.answered()
            return response

    return unary


def _server_stream(function: Function, around: Around) -> Function:
    def server_stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with around(context) as steps:
            steps.asked(request)
            for response in function(request, context):
                steps.answered()
                yield response

    return server_stream


def _both_streams(function: Function, around: Around) -> Function:
    def both_streams(requests: Iterable[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        with around(context) as steps:
            for response in function(_each(requests, steps), context):
                steps.answered()
                yield response

    return both_streams


def _both_by_callback(function: Function, around: Around) -> Function:
    def both_by_callback(
        requests: Iterable[Any], context: grpc.ServicerContext, send: Callable[[Any], None]
    ) -> None:
        with around(context) as steps:

            def sending(response: Any) -> None:
                if response is not None:
                    steps.answered()
                send(response)

            function(_each(requests, steps), context, sending)

    return both_by_callback


_WRAPPERS: dict[CallShape, Callable[[Function, Around], Function]] = {
    CallShape.UNARY: _unary,
    CallShape.SERVER_STREAM: _server_stream,
    CallShape.BOTH_STREAMS: _both_streams,
    CallShape.BOTH_BY_CALLBACK: _both_by_callback,
}


def _each(requests: Iterable[Any], steps: Steps) -> Iterator[Any]:
    for request in requests:
        steps.asked(request)
        yield request
