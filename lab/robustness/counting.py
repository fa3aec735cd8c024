"""What the calls of many engines come to, and a client that counts its own."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from threading import Lock
from typing import Any

import grpc
from google.protobuf.message import Message

from odma_service.client import Client

TIMEOUT_SECONDS = 1.0
PATIENCE_SECONDS = 60.0


class CallCounts:
    """What the calls of all engines came to."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.calls = 0
        self.errors: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.seconds = array("d")

    def called(self, seconds: float | None, code: str | None) -> None:
        """Count one attempt: how long it took, or the status that it ended with."""
        with self._lock:
            self.calls += 1
            if code is not None:
                self.errors[code] += 1
            elif seconds is not None:
                self.seconds.append(seconds)

    def failed(self, what: str) -> None:
        """Count one fault of an engine or of the server."""
        with self._lock:
            self.faults[what] += 1

    def add(self, calls: int, errors: Mapping[str, int], seconds: Iterable[float]) -> None:
        """Count the calls of another process."""
        with self._lock:
            self.calls += calls
            self.errors.update(errors)
            self.seconds.extend(seconds)


class CountingClient(Client):
    """A client whose every attempt is counted."""

    def __init__(
        self, target: str, tally: CallCounts, retry_seconds: float = PATIENCE_SECONDS
    ) -> None:
        super().__init__(target, timeout_seconds=TIMEOUT_SECONDS, retry_seconds=retry_seconds)
        self._tally = tally

    def call(self, method: Callable[..., Any], request: Message, *, retry: bool = True) -> Any:
        """Do as Client does, and count."""

        def counted(request: Message, **how: Any) -> Any:
            begun = time.monotonic()
            try:
                answer = method(request, **how)
            except grpc.RpcError as error:
                self._tally.called(None, error.code().name)
                raise
            self._tally.called(time.monotonic() - begun, None)
            return answer

        return super().call(counted, request, retry=retry)
