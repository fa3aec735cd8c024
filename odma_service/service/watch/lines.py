"""Lines of the log: given to a thread that writes them, so that no caller waits or fails.

Whatever stderr is - a pipe that nobody reads, closed, on a full disk - a line is kept in a queue
or lost, and the lost ones are counted. Once lines can be written again, one says how many are
missing.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, Lock, Thread
from time import monotonic

MOST_QUEUED = 1024
LONGEST_LINE = 64 * 1024
CLOSE_SECONDS = 1.0
STDERR = 2


class Lines:
    """The lines that wait for one file. A stream as print, logging and structlog write to it."""

    encoding = "utf-8"

    def __init__(self, descriptor: int, most: int = MOST_QUEUED) -> None:
        self._descriptor = descriptor
        self._most = most
        self._queue: deque[str] = deque()
        self._news = Condition(Lock())
        self._closed = False
        self._told = 0
        self.lost = 0
        """Lines that were not written."""
        self._thread = Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        """Take text, or count it as lost. Never waits for the file."""
        with self._news:
            if self._closed or len(self._queue) >= self._most:
                self.lost += 1
            else:
                self._queue.append(text[:LONGEST_LINE])
                self._news.notify()
        return len(text)

    def flush(self) -> None:
        """Do nothing: the thread writes as soon as it can."""

    def isatty(self) -> bool:
        """Whether the file is a terminal."""
        try:
            return os.isatty(self._descriptor)
        except OSError:
            return False

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def close(self) -> None:
        """Write what is queued, for a second at most."""
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                text, missing = self._queue.popleft(), self.lost - self._told
            if missing:
                text = f"{missing} lines of the log were lost before this one\n{text}"
            try:
                _write_all(self._descriptor, text)
            except (OSError, ValueError):
                self.lost += 1
            else:
                self._told += missing


def _write_all(descriptor: int, text: str) -> None:
    left = text.encode(errors="backslashreplace")
    while left:
        left = left[os.write(descriptor, left) :]


@contextmanager
def standard_error() -> Iterator[Lines]:
    """Put Lines in the place of sys.stderr, for everything in Python that writes there."""
    before = sys.stderr
    lines = Lines(STDERR if before is not None else os.open(os.devnull, os.O_WRONLY))
    sys.stderr = lines
    try:
        yield lines
    finally:
        sys.stderr = before
        lines.close()


class Seldom:
    """Lets `most` lines in `seconds` through and counts the others."""

    def __init__(
        self, most: int = 10, seconds: float = 10.0, clock: Callable[[], float] = monotonic
    ) -> None:
        self._most = most
        self._seconds = seconds
        self._clock = clock
        self._lock = Lock()
        self._since = clock()
        self._let_through = 0
        self._left_out = 0

    def let(self) -> int | None:
        """Return how many were left out since the last line, None if this one is, too."""
        with self._lock:
            now = self._clock()
            if now - self._since >= self._seconds:
                self._since, self._let_through = now, 0
            if self._let_through >= self._most:
                self._left_out += 1
                return None
            self._let_through += 1
            left_out, self._left_out = self._left_out, 0
            return left_out
