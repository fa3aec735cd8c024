"""The reaper: looks at the clocks of all pools twice a second, without being called.

A look that comes much too late means that the process was stopped, or its machine. No owner
can have been heard in that time, so it is not counted as their silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic

import structlog

from odma_service.service.pools.registry import Registry

PERIOD_SECONDS = 0.5

log = structlog.get_logger()


@contextmanager
def reaping(registry: Registry) -> Iterator[None]:
    """Close the pools of silent owners, in a thread, for as long as the context lasts."""
    stop = Event()

    def reap() -> None:
        looked_at = monotonic()
        while not stop.wait(PERIOD_SECONDS):
            now = monotonic()
            late_seconds = now - looked_at - PERIOD_SECONDS
            looked_at = now
            missed_seconds = late_seconds if late_seconds > PERIOD_SECONDS else 0.0
            try:
                registry.reap(now, missed_seconds=missed_seconds)
            except Exception:
                log.exception("the reaper failed; it goes on")

    thread = Thread(target=reap, name="reaper")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
