"""A pool's file as an operator finds it: opened only if it is ours, attached only as a copy.

Attaching takes the writer's lock and finishes what was half done, so it is left to a private
copy of the content.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import typer

from odma_service._native import Arena
from odma_service.errors import BooksCorruptError, BooksError, OdmaError

ANYBODY_ELSE = stat.S_IRWXG | stat.S_IRWXO
LOCK = struct.Struct("hhqqi")
WHOLE_FILE = LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


class FileError(OdmaError):
    """A file that cannot be used as it is."""


@contextmanager
def failing_in_one_line(command: str) -> Iterator[None]:
    """Exit with 1 for broken books and with 2 for all else, and say why."""
    try:
        yield
    except OdmaError as error:
        typer.echo(f"odma arena {command}: {error}", err=True)
        raise typer.Exit(1 if isinstance(error, BooksCorruptError) else 2) from None
    except OSError as error:
        typer.echo(f"odma arena {command}: {error}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def opened(file: Path, access: int) -> Iterator[int]:
    """Open a file of ours. Raises FileError for links, other kinds and rights of others."""
    try:
        descriptor = os.open(file, access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise FileError(f"{file}: {error.strerror}") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise FileError(f"{file}: it is not a regular file")
        if mode & ANYBODY_ELSE:
            allowed = f"{stat.S_IMODE(mode):o}"
            raise FileError(f"{file}: others than its owner may use it (mode {allowed})")
        yield descriptor
    finally:
        os.close(descriptor)


def read(descriptor: int) -> bytes:
    """Return all of a file, or as much of it as there still is."""
    size = os.fstat(descriptor).st_size
    content = bytearray()
    while len(content) < size:
        part = os.pread(descriptor, size - len(content), len(content))
        if not part:
            break
        content += part
    return bytes(content)


def is_locked(descriptor: int) -> bool:
    """Ask for the writer's lock without taking it."""
    told = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, WHOLE_FILE)
    return bool(LOCK.unpack(told)[0] != fcntl.F_UNLCK)


@contextmanager
def attached(file: Path, content: bytes) -> Iterator[Arena]:
    """Attach a copy of a file's content. Raises why it cannot be used."""
    with TemporaryDirectory(prefix="odma-arena-") as directory:
        path = Path(directory) / file.name
        path.touch(mode=0o600)
        path.write_bytes(content)
        try:
            arena = Arena.attach(path)
        except BooksError as error:
            raise type(error)(str(error).replace(str(path), str(file))) from None
        with arena:
            yield arena
