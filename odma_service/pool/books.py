"""A pool's file as an operator finds it: opened only if it is ours, attached only as a copy.

Attaching takes the writer's lock and finishes what was half done, so it is left to a private
copy, made when two readings of the file agreed. Books that cannot be used are set aside.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from odma_service._native import Arena
from odma_service.errors import BooksError, BooksForeignError

ANYBODY_ELSE = stat.S_IRWXG | stat.S_IRWXO
LOCK = struct.Struct("hhqqi")
WHOLE_FILE = LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)

READINGS = 50
"""Of a file in use, until two agree: a commit takes much less time than a reading."""

IN_USE = ", and a process has it open for writing now"


class Copy(NamedTuple):
    """A file's books as of one moment. in_use: a process has them open for writing."""

    arena: Arena
    in_use: bool


@contextmanager
def copied(file: Path) -> Iterator[Copy]:
    """Attach a private copy of a file. Raises BooksError: why the file cannot be used."""
    with _opened(file) as descriptor:
        content, in_use = _steady(file, descriptor), _is_locked(descriptor)
    try:
        with _attached(file, content) as arena:
            yield Copy(arena, in_use)
    except BooksError as error:
        raise type(error)(str(error) + IN_USE * in_use) from None


def set_aside(path: Path, reason: str) -> Path:
    """Rename books that cannot be used to NAME.set-aside-N and return the new path.

    The reason goes into a text file beside it, if there is room. Nothing reads them again but
    people. Raises OSError: the books are where they were.
    """
    number = 1
    while (aside := path.with_name(f"{path.name}.set-aside-{number}")).exists():
        number += 1
    path.rename(aside)
    with suppress(OSError):
        aside.with_name(f"{aside.name}.reason").write_text(reason + "\n")
    return aside


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    """Open a file of ours to read. Raises BooksError for links, other kinds, rights of others."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BooksError(f"{file}: {error.strerror}") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise BooksForeignError(f"{file}: it is not a regular file")
        if mode & ANYBODY_ELSE:
            allowed = f"{stat.S_IMODE(mode):o}"
            raise BooksForeignError(f"{file}: others than its owner may use it (mode {allowed})")
        yield descriptor
    finally:
        os.close(descriptor)


def _steady(file: Path, descriptor: int) -> bytes:
    """Return a content that nobody changed while it was read."""
    last = b""
    for _ in range(READINGS):
        content = _read(descriptor)
        if content == last:
            return content
        last = content
    raise BooksError(f"{file}: it changes too fast to be copied; stop its engine, or look again")


def _read(descriptor: int) -> bytes:
    """Return all of a file, or as much of it as there still is."""
    size = os.fstat(descriptor).st_size
    content = bytearray()
    while len(content) < size:
        part = os.pread(descriptor, size - len(content), len(content))
        if not part:
            break
        content += part
    return bytes(content)


def _is_locked(descriptor: int) -> bool:
    """Ask for the writer's lock without taking it."""
    told = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, WHOLE_FILE)
    return bool(LOCK.unpack(told)[0] != fcntl.F_UNLCK)


@contextmanager
def _attached(file: Path, content: bytes) -> Iterator[Arena]:
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
