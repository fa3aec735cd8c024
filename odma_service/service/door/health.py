"""The standard health service, for names that exist: nothing is kept about any other name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from threading import Event, Lock
from typing import Any

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1.health_pb2_grpc import HealthServicer

from odma_service.errors import CallerLimitError, OdmaError
from odma_service.service.rpc.statuses import abort, status_of

ALIVE = "odma.alive"
"""The health of this name is SERVING as long as the process answers, while it drains too."""

MOST_OF_A_PEER = 64
"""Watchers at one address."""
LOOK_SECONDS = 1.0
"""A watch looks so often whether its client is there, should nobody have told."""


class Health(HealthServicer):
    """SERVING for each of `names`, for all together ("") and for ALIVE."""

    def __init__(self, names: Iterable[str]) -> None:
        self._lock = Lock()
        self._changes: set[Event] = set()
        """One of each watcher: something changed, or its client has gone."""
        self._status: dict[str, Any] = dict.fromkeys(
            ("", ALIVE, *names), pb.HealthCheckResponse.SERVING
        )
        self._watchers: Counter[str] = Counter()

    def drain(self) -> None:
        """Set all but ALIVE to NOT_SERVING."""
        with self._lock:
            for name in self._status.keys() - {ALIVE}:
                self._status[name] = pb.HealthCheckResponse.NOT_SERVING
            for change in self._changes:
                change.set()

    def serves(self, name: str) -> bool:
        """Return whether the health of a name is SERVING."""
        return bool(self._status.get(name) == pb.HealthCheckResponse.SERVING)

    def Check(  # noqa: N802
        self, request: pb.HealthCheckRequest, context: grpc.ServicerContext
    ) -> pb.HealthCheckResponse:
        status = self._status.get(request.service)
        if status is None:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details(f"known are {', '.join(filter(None, self._status))}, and none: all")
        return pb.HealthCheckResponse(status=status)

    def Watch(  # noqa: N802
        self, request: pb.HealthCheckRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.HealthCheckResponse]:
        host, change = context.peer().rpartition(":")[0], Event()
        try:
            self._enter(host, change)
        except OdmaError as error:
            abort(context, status_of(error))
        context.add_callback(change.set)
        told = None
        try:
            while context.is_active():
                change.clear()
                status = self._status.get(request.service, pb.HealthCheckResponse.SERVICE_UNKNOWN)
                if status != told:
                    told = status
                    yield pb.HealthCheckResponse(status=status)
                elif context.is_active():
                    change.wait(LOOK_SECONDS)
        finally:
            self._leave(host, change)

    def _enter(self, host: str, change: Event) -> None:
        with self._lock:
            if self._watchers[host] >= MOST_OF_A_PEER:
                raise CallerLimitError(f"{MOST_OF_A_PEER} watchers of this address are there")
            self._watchers[host] += 1
            self._changes.add(change)

    def _leave(self, host: str, change: Event) -> None:
        with self._lock:
            self._changes.discard(change)
            self._watchers[host] -= 1
            if not self._watchers[host]:
                del self._watchers[host]
