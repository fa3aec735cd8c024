"""Files that hold secrets: their permissions are checked, and changed files are read again."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Generic, TypeVar

import structlog

from odma_service.errors import OdmaError

LARGEST_FILE_BYTES = 1 << 20
PAUSE_SECONDS = 1.0
"""Until files that were refused are read again: the trouble may have been the system's."""

Value = TypeVar("Value")

log = structlog.get_logger()


def read_file(path: Path, *, private: bool) -> bytes:
    """Return the content of a regular file of at most 1 MiB. Raises OdmaError that names it.

    A private file has to belong to this user and be closed to all others. It may also be root's
    and readable for a group, as secrets are that an administrator hands out.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OdmaError(f"{path} is no regular file")
            if private:
                _insist_private(path, found)
            content = file.read(LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise OdmaError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > LARGEST_FILE_BYTES:
        raise OdmaError(f"{path} is larger than {LARGEST_FILE_BYTES:,} bytes")
    return content


def _insist_private(path: Path, found: os.stat_result) -> None:
    if found.st_uid not in {0, os.geteuid()}:
        raise OdmaError(f"{path} belongs to another user; it must be this user's or root's")
    forbidden = 0o027 if found.st_uid == 0 else 0o077
    if found.st_mode & forbidden:
        mode = stat.S_IMODE(found.st_mode)
        raise OdmaError(
            f"{path} is open to other users (mode {mode:04o}); it must be {0o666 & ~forbidden:04o} "
            "or tighter"
        )


def insist_trusted(path: Path) -> None:
    """Raise OdmaError if others than root and this user decide what a file or directory holds."""
    try:
        found = path.stat()
    except OSError as error:
        raise OdmaError(f"cannot read {path}: {error.strerror}") from None
    if found.st_uid not in {0, os.geteuid()}:
        raise OdmaError(f"{path} belongs to another user; it must be this user's or root's")
    if found.st_mode & stat.S_IWOTH:
        raise OdmaError(f"everybody may write to {path}: what it holds would steer the service")


class Reloaded(Generic[Value]):
    """A value read from files, and read again when one of them changes.

    While the new files are bad, the old value stays, the log names the reason and `failing` is
    true.
    """

    def __init__(self, files: Sequence[Path], read: Callable[[], Value]) -> None:
        """Read for the first time. Raises the errors of `read`."""
        self._files = files
        self._read = read
        self._lock = Lock()
        self._stamp = self._look()
        self._refused: list[tuple[int, ...]] | None = None
        self._again_at = 0.0
        self._value = read()

    @property
    def failing(self) -> bool:
        """Whether the files were refused when they were last looked at."""
        return self._refused is not None

    def get(self) -> Value:
        """Return the value as of now."""
        with self._lock:
            stamp = self._look()
            if stamp == self._stamp:
                self._refused = None
            elif stamp != self._refused or monotonic() >= self._again_at:
                self._renew(stamp)
            return self._value

    def _renew(self, stamp: list[tuple[int, ...]]) -> None:
        """Read files that have changed; those that are refused again after a second."""
        names = [str(file) for file in self._files]
        try:
            self._value = self._read()
        except OdmaError as error:
            if stamp != self._refused:
                log.error(
                    "changed files refused; the old ones stay", files=names, reason=str(error)
                )
            self._refused = stamp
            self._again_at = monotonic() + PAUSE_SECONDS
        else:
            self._stamp, self._refused = stamp, None
            log.info("changed files read", files=names)

    def _look(self) -> list[tuple[int, ...]]:
        """Return stamps that differ once a file was written or replaced."""
        stamps: list[tuple[int, ...]] = []
        for file in self._files:
            try:
                found = file.stat()
            except OSError:
                stamps.append(())
            else:
                stamps.append((found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
        return stamps
