"""A source of rows: a file, a pipe or a FIFO, compressed by gzip or not, opened once.

What cannot be read twice is kept on the way, so that a format can be recognised first and read
then, whatever the source is.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from shutil import copyfileobj
from tempfile import SpooledTemporaryFile
from typing import Any, BinaryIO, cast

from odma_service.traces.trace import TraceError

GZIP = b"\x1f\x8b"
KEPT_IN_MEMORY_BYTES = 64 << 20


class _Text(io.TextIOWrapper):
    """Text of a file that stays open when the text is done with."""

    def close(self) -> None: ...


class Source:
    """An open source. `named`: its user has said which format it has."""

    def __init__(self, path: Path, file: BinaryIO, *, named: bool = False) -> None:
        self.path = path
        self.file = file
        self.named = named
        self._document: Any = None

    @property
    def label(self) -> str:
        """The name of its file, without what says how it is stored."""
        return (self.path.with_suffix("") if self.path.suffix == ".gz" else self.path).stem

    def wrong(self, flaw: str) -> TraceError:
        """Return the error that says what is wrong with it."""
        return TraceError(f"{self.path}: {flaw}")

    def head(self, count: int) -> bytes:
        """Return its first bytes."""
        self.file.seek(0)
        return self.file.read(count)

    def lines(self, newline: str | None = None) -> Iterator[str]:
        """Yield its lines from the first on."""
        self.file.seek(0)
        return _Text(self.file, "utf-8-sig", newline=newline)

    def cells(self) -> Iterator[list[str]]:
        """Yield the rows of a CSV, its header first. Empty lines are no rows."""
        try:
            yield from filter(None, csv.reader(self.lines(newline="")))
        except csv.Error as error:
            raise self.wrong(f"not a CSV: {error}") from error

    def records(self, rows: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield JSON objects and their rows: one on each line, those of a list, or only one."""
        for row, record in enumerate(islice(self.values(), rows), 1):
            if not isinstance(record, dict):
                raise self.wrong(f"row {row}: not a JSON object")
            yield row, record

    def values(self) -> Iterator[Any]:
        """Yield what each line says as JSON, or each element of a list; None is no JSON."""
        lines = filter(str.strip, self.lines())
        first = next(lines, "")
        if isinstance(_parsed(first), dict):
            yield _parsed(first)
            yield from map(_parsed, lines)
            return
        if self._document is None:
            self._document = _parsed("".join(self.lines()))
        yield from self._document if isinstance(self._document, list) else [self._document]


@contextmanager
def opened(path: Path, *, named: bool = False) -> Iterator[Source]:
    """Give the source at a path. Raises TraceError, also for what reading it raises."""
    try:
        with path.open("rb") as file, _seekable(file) as whole, _unpacked(whole) as plain:
            yield Source(path, plain, named=named)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(f"{path}: damaged gzip: {error}") from error
    except OSError as error:
        raise unusable(path, error) from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not UTF-8 text") from error


def unusable(path: Path, error: OSError) -> TraceError:
    """Return the error that says why a file cannot be read or written."""
    return TraceError(f"{path}: {error.strerror or error}")


@contextmanager
def _seekable(file: BinaryIO) -> Iterator[BinaryIO]:
    if file.seekable():
        yield file
        return
    with SpooledTemporaryFile(KEPT_IN_MEMORY_BYTES) as kept:
        copyfileobj(file, kept)
        kept.seek(0)
        yield cast("BinaryIO", kept)


@contextmanager
def _unpacked(file: BinaryIO) -> Iterator[BinaryIO]:
    packed = file.read(len(GZIP)) == GZIP
    file.seek(0)
    if not packed:
        yield file
        return
    with gzip.open(file) as plain:
        yield cast("BinaryIO", plain)


def _parsed(text: str) -> Any:
    """Return what a text says as JSON; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
