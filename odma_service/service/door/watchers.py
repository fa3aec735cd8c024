"""Watch: each watcher reads the kept events at its own pace, on a thread of its own.

grpcio gives a stream one of the threads that answer calls, for as long as the client likes. So
watchers have threads of their own, a bounded number, as Stream's clients do.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import cast

import grpc

from odma_service.errors import InvalidError, OdmaError, StreamLimitError, UnavailableError
from odma_service.rpc.v1 import pool_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.service.door.access import may_see_of
from odma_service.service.rpc.names import name_from
from odma_service.service.rpc.statuses import abort, status_of
from odma_service.service.watch.events import Event, Events

MOST_WATCHERS = 32
LOOK_SECONDS = 1.0
"""So long a thread may still wait for events of a client that is gone."""


class Watchers:
    """Those who watch. Called by grpcio as the handler of the rpc."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._lock = Lock()
        self._watching = 0
        # One thread more than watchers: it tells those that are too many.
        self.experimental_thread_pool = ThreadPoolExecutor(MOST_WATCHERS + 1, "watch")

    def close(self) -> None:
        """Give the threads back, after the server has stopped."""
        self.experimental_thread_pool.shutdown()

    def __call__(
        self, request: pb.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchResponse]:
        try:
            self._enter()
            try:
                yield from self._watch(request, context)
            finally:
                self._leave()
        except OdmaError as error:
            abort(context, status_of(error))

    def _watch(
        self, request: pb.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchResponse]:
        events, name = self._events, request.name and name_from(request.name)
        cursor, lost = self._start(request)
        yield pb.WatchResponse(cursor=cursor, incarnation=events.incarnation, lost=lost)
        while context.is_active():
            missed = events.after(cursor, LOOK_SECONDS)
            if missed.lost:
                cursor = missed.events[0].cursor - 1
                yield pb.WatchResponse(cursor=cursor, incarnation=events.incarnation, lost=True)
            for event in missed.events:
                cursor = event.cursor
                if name in {"", event.pool} and may_see_of(event.owner):
                    yield pb.WatchResponse(
                        cursor=cursor, incarnation=events.incarnation, event=_event_to(event)
                    )
            if events.over:
                raise UnavailableError("the service is draining; watch again")

    def _start(self, request: pb.WatchRequest) -> tuple[int, bool]:
        """Return the cursor to begin behind, and whether events before it are lost."""
        events = self._events
        if not request.incarnation:
            if request.cursor:
                raise InvalidError("cursor", "0 without an incarnation")
            return events.last, False
        if request.incarnation != events.incarnation:
            return 0, True
        if request.cursor > events.last:
            raise InvalidError("cursor", f"at most {events.last}, the last given out")
        return request.cursor, False

    def _enter(self) -> None:
        with self._lock:
            if self._watching >= MOST_WATCHERS:
                raise StreamLimitError(f"all {MOST_WATCHERS} watchers are there; use ListPools")
            self._watching += 1

    def _leave(self) -> None:
        with self._lock:
            self._watching -= 1


def _event_to(event: Event) -> pb.Event:
    return pb.Event(
        kind=cast("pb.EventKind.ValueType", int(event.kind)),
        pool=types.PoolRef(name=event.pool, epoch=event.epoch),
        unix_seconds=event.unix_seconds,
        reason=event.reason,
        policy_version=event.policy_version,
    )
