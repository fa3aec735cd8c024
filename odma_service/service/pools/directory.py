"""The pool directory: for one server at a time, and with the highest epoch ever given in it.

Both are in one small file, locked as long as its server lives. A lock of the system goes with its
process, however that ends.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

from odma_service.errors import OdmaError

LOCK_NAME = "odma.lock"
LINE_BYTES = 64


class DirectoryTakenError(OdmaError):
    """Another server has the directory."""


class PoolDirectory:
    """A directory that this process has locked."""

    def __init__(self, path: Path, descriptor: int, last_epoch: int) -> None:
        """Use PoolDirectory.take."""
        self.path = path
        self.last_epoch = last_epoch
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: Path) -> Self:
        """Lock a directory.

        Raises DirectoryTakenError that names the process that has it, OdmaError if no file can be
        made.
        """
        try:
            return cls._try(path)
        except OSError as error:
            file = path / LOCK_NAME
            raise OdmaError(f"cannot lock the pool directory: {file}: {error.strerror}") from None

    @classmethod
    def _try(cls, path: Path) -> Self:
        file = path / LOCK_NAME
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        while True:
            descriptor = os.open(file, flags, 0o600)
            try:
                pid, last_epoch = _read(descriptor)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise DirectoryTakenError(
                        f"the pool directory {path} belongs to another server, process {pid}; stop "
                        "it, use another pool-dir, or wait for its end with --wait-for-pool-dir"
                    ) from None
                if _is_at(descriptor, file):
                    taken = cls(path, descriptor, last_epoch)
                    taken.keep_epoch(last_epoch)
                    return taken
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # it was replaced between open and lock

    def keep_epoch(self, epoch: int) -> None:
        """Note the highest epoch, for the time after lost books and a clock that was set back.

        Its line is always as long, so it needs no room. A file system that is read-only now keeps
        the one before.
        """
        line = f"process {os.getpid()} epoch {epoch}".ljust(LINE_BYTES - 1) + "\n"
        with suppress(OSError):
            os.pwrite(self._descriptor, line.encode(), 0)

    def close(self) -> None:
        """Give the directory up."""
        os.close(self._descriptor)


def _read(descriptor: int) -> tuple[str, int]:
    """Return the process and the epoch that the file names: "unknown" and 0 if it is none."""
    words = os.pread(descriptor, LINE_BYTES, 0).split()
    if len(words) == 4 and words[1].isdigit() and words[3].isdigit():
        return words[1].decode(), int(words[3])
    return "unknown", 0


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.lstat())
    except FileNotFoundError:
        return False
