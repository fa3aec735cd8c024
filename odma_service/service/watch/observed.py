"""Calls observed, whatever the shape of their rpc: the common part of metrics and traces."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Protocol

import grpc
from google.protobuf import descriptor_pool

from odma_service.service.door.handlers import CallShape, Handler, Parts, Steps

UNKNOWN_RPC = "(unknown)"


class CallWatch(Steps, Protocol):
    """Learns the steps of a call, and its end."""

    def ended(self, code: grpc.StatusCode) -> None:
        """Take note that the call is over; nothing follows."""


class CallObserver(grpc.ServerInterceptor, ABC):
    """Observes calls. Put before other interceptors, it sees their refusals.

    Neither the wait for a thread nor the network are in what it sees.
    """

    def __init__(self) -> None:
        self._observed: dict[str, tuple[Handler, Handler]] = {}

    @abstractmethod
    def watch(self, rpc: str, shape: CallShape, context: grpc.ServicerContext) -> CallWatch:
        """Return the watch on a call that begins. `rpc`: package.Service.Rpc, UNKNOWN_RPC."""

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the handler of a call, observed."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        rpc = _rpc_name(handler_call_details.method)
        known = self._observed.get(rpc)
        if known is None or known[0] is not handler:
            parts = Parts.of(handler)
            watching = partial(_Watched, partial(self.watch, rpc, parts.shape))
            known = self._observed[rpc] = handler, parts.around(watching).handler()
        return known[1]


class _Watched:
    """A call, observed: the context in which it is answered."""

    __slots__ = ("_context", "_watch")

    def __init__(
        self, watch: Callable[[grpc.ServicerContext], CallWatch], context: grpc.ServicerContext
    ) -> None:
        self._context = context
        self._watch = watch(context)

    def __enter__(self) -> CallWatch:
        return self._watch

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        code = grpc.StatusCode.OK
        if kind is not None:
            gone = kind is GeneratorExit
            code = grpc.StatusCode.CANCELLED if gone else grpc.StatusCode.UNKNOWN
        self._watch.ended(self._context.code() or code)  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _rpc_name(method: str) -> str:
    """Return the full name of an rpc that is served; all others have one name together."""
    name = method.strip("/").replace("/", ".")
    try:
        descriptor_pool.Default().FindMethodByName(name)
    except KeyError:
        return UNKNOWN_RPC
    return name
