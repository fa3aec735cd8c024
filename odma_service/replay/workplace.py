"""A place for the arenas of a replay."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


@contextmanager
def workplace() -> Iterator[Path]:
    """Give a directory for arenas, in memory where the system has such a place."""
    parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="odma-arenas-", dir=parent) as directory:
        yield Path(directory)
