"""An engine in a thread of its own, for callers in other threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import Empty, Queue
from threading import Thread
from typing import NamedTuple, Self

from odma_service.engines.transformers.engine import Engine
from odma_service.engines.transformers.memory import Memory
from odma_service.engines.transformers.requests import Request
from odma_service.errors import OdmaError, UnavailableError
from odma_service.values import End

KEEP_ALIVE_SECONDS = 20.0
"""A third of the ttl_seconds that a pool has without further word."""


class Event(NamedTuple):
    """What happened to a request: a token, its end, or the error for which it was given up."""

    token: int | None
    end: End | None
    error: OdmaError | None


Listener = Callable[[Event], None]


class Runner:
    """Steps an engine while there is work. Listeners are called in its thread."""

    def __init__(self, engine: Engine, pool: Memory, failed: Callable[[], None]) -> None:
        """`failed` is called once if the engine cannot go on: see `failure`."""
        self.failure: OdmaError | None = None
        self._engine = engine
        self._pool = pool
        self._failed = failed
        self._inbox: Queue[Callable[[], None]] = Queue()
        self._listeners: dict[Request, Listener] = {}
        self._stopped = False
        self._heard = time.monotonic()
        self._thread = Thread(target=self._run, name="odma-engine", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End what runs, give its memory back, and wait for it."""
        self._inbox.put(self._stop)
        self._thread.join()

    def submit(self, request: Request, listener: Listener) -> None:
        """Take a request. Raises InvalidError for one that never fits, or the failure."""
        self._engine.check(request)
        self._inbox.put(lambda: self._begin(request, listener))
        if self.failure is not None:
            raise self.failure

    def finish(self, request: Request, end: End) -> None:
        """End a request that is not over; its listener hears no more of it."""
        self._inbox.put(lambda: self._end(request, end))

    def _begin(self, request: Request, listener: Listener) -> None:
        self._listeners[request] = listener
        self._engine.submit(request)

    def _end(self, request: Request, end: End) -> None:
        self._engine.finish(request, end)
        self._listeners.pop(request, None)

    def _stop(self) -> None:
        self._stopped = True
        for request in list(self._listeners):
            self._end(request, End.ABORTED)

    def _run(self) -> None:
        try:
            while self._engine.busy or not self._stopped:
                self._listen(wait=not self._engine.busy)
                self._step()
        except OdmaError as error:
            self.failure = error
        finally:
            self.failure = self.failure or OdmaError("the engine has stopped")
            self._listen(wait=False)  # whoever comes later sees the failure
            for listener in self._listeners.values():
                listener(Event(None, None, self.failure))
            if not self._stopped:
                self._failed()

    def _listen(self, *, wait: bool) -> None:
        """Do what callers ask."""
        try:
            self._inbox.get(wait, KEEP_ALIVE_SECONDS)()
            while True:
                self._inbox.get_nowait()()
        except Empty:
            pass

    def _step(self) -> None:
        try:
            if time.monotonic() - self._heard > KEEP_ALIVE_SECONDS:
                self._heard = time.monotonic()
                self._pool.keep_alive()
            told = self._engine.step() if self._engine.busy else []
        except UnavailableError:
            if self._stopped:
                raise
            return  # the service restarts: the next step asks the same again
        for request in told:
            token = request.output[-1] if request.output else None
            self._listeners[request](Event(token, request.end, request.error))
            if request.over:
                del self._listeners[request]
