"""How a command ends: a failure is one line on stderr, and the exit code tells its kind.

0    The command did its work.
1    It did, and the result is bad: broken books, a lost token, a service that does not serve.
2    It could not do its work: a wrong command line, any other OdmaError, an OSError.
130  Ctrl-C ended it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from odma_service.cli.plain import printable
from odma_service.errors import OdmaError

EXIT_CODES = (
    "Exit codes: 0, done; 1, done, and the result is bad; 2, it could not be done."
    " A failure is one line on stderr."
)
BAD, IMPOSSIBLE = 1, 2

UsageError: Any = typer.BadParameter.__base__
"""A wrong command line raises it; typer does not export it."""


class BadResultError(OdmaError):
    """A command did its work, and the result is bad: exit code 1. `lines` say what is bad."""

    def __init__(self, *lines: str) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


class CommandError(Exception):
    """A command, as its user called it, and the error that ended it."""

    def __init__(self, command: str, error: OdmaError | OSError) -> None:
        super().__init__(command, error)
        self.command = command
        self.error = error


@contextmanager
def bad_result(*errors: type[OdmaError]) -> Iterator[None]:
    """Turn these errors into a BadResultError."""
    try:
        yield
    except errors as error:
        raise BadResultError(str(error)) from error


def exit_code_of(run: Callable[[], int | None]) -> int | None:
    """Run a command, say why it failed if it did, and return its exit code."""
    try:
        return run()
    except UsageError as error:
        _say(error.ctx.command_path if error.ctx else "odma", error.format_message())
    except CommandError as failed:
        if isinstance(failed.error, BadResultError):
            _say(failed.command, *failed.error.lines)
            return BAD
        _say(failed.command, _reason(failed.error))
    return IMPOSSIBLE


def _reason(error: OdmaError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _say(command: str, *reasons: str) -> None:
    for reason in reasons:
        if reason:  # there is none where the help was printed
            typer.echo(f"{command}: {printable(' '.join(reason.split()))}", err=True)
