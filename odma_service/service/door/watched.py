"""Looks at files that are read again when they change, also while nobody calls.

So a token file that cannot be used is told when it is written, and a certificate's end when it
comes; both are metrics, too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any, NamedTuple

import structlog

from odma_service.service.door.private import Reloaded
from odma_service.service.door.tls import Certificates

LOOK_SECONDS = 2.0
SOON_SECONDS = 14 * 86_400.0
"""A certificate's end is told so long before."""

log = structlog.get_logger()


class Watched(NamedTuple):
    """The files of one service: by their metric's label, and the certificates among them."""

    files: Mapping[str, Reloaded[Any]]
    certificates: Reloaded[Certificates] | None

    @contextmanager
    def looking(self, look_seconds: float = LOOK_SECONDS) -> Iterator[None]:
        """Look every few seconds, in a thread, for as long as the context lasts."""
        stop = Event()

        def look() -> None:
            told = None
            while True:
                for file in self.files.values():
                    file.get()
                told = self._tell_end(told)
                if stop.wait(look_seconds):
                    return

        thread = Thread(target=look, name="files", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _tell_end(self, told: tuple[float, bool] | None) -> tuple[float, bool] | None:
        """Log once that a certificate ends soon, and once that it has; return what was told."""
        if self.certificates is None:
            return None
        not_after = self.certificates.get().not_after_unix_seconds
        left = not_after - time.time()
        if left > SOON_SECONDS or told == (not_after, left <= 0):
            return told
        if left <= 0:
            log.error("the TLS certificate is over: clients refuse it", not_after=not_after)
        else:
            log.warning("the TLS certificate ends soon", days=round(left / 86_400, 1))
        return not_after, left <= 0
