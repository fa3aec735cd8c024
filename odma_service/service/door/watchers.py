"""Watch: each watcher reads the kept events at its own pace, on a thread of its own.

Watchers have threads of their own, a bounded number, for the reason that streams have.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import cast

import grpc

from odma_service.errors import (
    CallerLimitError,
    InvalidError,
    OdmaError,
    StreamLimitError,
    UnavailableError,
)
from odma_service.rpc.v1 import pool_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.service.door.access import CALLER, Identity, insist_still_known, may_see_of
from odma_service.service.door.handlers import OwnThreads
from odma_service.service.rpc.names import name_from
from odma_service.service.rpc.statuses import abort, status_of
from odma_service.service.watch.events import Event, Events

MOST_WATCHERS = 32
MOST_OF_AN_IDENTITY = 16
LOOK_SECONDS = 1.0
"""A thread may wait so long for events after its client has gone."""


class Watchers(OwnThreads):
    """The clients that watch, and the handler of the rpc."""

    def __init__(self, events: Events) -> None:
        super().__init__(MOST_WATCHERS, "watch")
        self._events = events
        self._lock = Lock()
        self._watching: list[Identity | None] = []

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
            insist_still_known()
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
        caller = CALLER.get()
        with self._lock:
            if len(self._watching) >= MOST_WATCHERS:
                raise StreamLimitError(f"all {MOST_WATCHERS} watchers are there; use ListPools")
            own = [one for one in self._watching if caller and one and one.who == caller.who]
            if len(own) >= MOST_OF_AN_IDENTITY:
                raise CallerLimitError(f"{MOST_OF_AN_IDENTITY} watchers of this caller are there")
            self._watching.append(caller)

    def _leave(self) -> None:
        with self._lock:
            self._watching.remove(CALLER.get())


def _event_to(event: Event) -> pb.Event:
    return pb.Event(
        kind=cast("pb.EventKind.ValueType", int(event.kind)),
        pool=types.PoolRef(name=event.pool, epoch=event.epoch),
        unix_seconds=event.unix_seconds,
        reason=event.reason,
        policy_version=event.policy_version,
    )
