"""The reaper: looks at the clocks of all pools twice a second, without being called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

import structlog

from odma_service.service.pools.registry import Registry

PERIOD_SECONDS = 0.5

log = structlog.get_logger()


@contextmanager
def reaping(registry: Registry) -> Iterator[None]:
    """Close the pools of silent owners, in a thread, for as long as the context lasts."""
    stop = Event()

    def reap() -> None:
        while not stop.wait(PERIOD_SECONDS):
            try:
                registry.reap()
            except Exception:
                log.exception("the reaper failed; it goes on")

    thread = Thread(target=reap, name="reaper")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
