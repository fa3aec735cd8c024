"""However a command fails, it says so in lines on stderr, and the exit code tells its kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from odma_service.cli.failures import BadResultError, bad_result
from odma_service.cli.lazy import Commands
from odma_service.errors import BooksCorruptError, OdmaError

app = typer.Typer(name="odma", cls=Commands)
inner = typer.Typer(cls=Commands)
app.add_typer(inner, name="inner")


@inner.command()
def work() -> None:
    pass


@inner.command()
def error() -> None:
    raise OdmaError("two\nlines")


@inner.command()
def system() -> None:
    Path("/no/such/file").read_text()


@inner.command()
def bad() -> None:
    raise BadResultError("one token", "another token")


@inner.command()
def broken() -> None:
    with bad_result(BooksCorruptError):
        raise BooksCorruptError("a rule is broken")


@inner.command()
def stopped() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("inner work", 0, []),
        ("inner error", 2, ["odma inner error: two lines"]),
        ("inner system", 2, ["odma inner system: /no/such/file: No such file or directory"]),
        ("inner bad", 1, ["odma inner bad: one token", "odma inner bad: another token"]),
        ("inner broken", 1, ["odma inner broken: a rule is broken"]),
        ("inner stopped", 130, []),
        ("inner work more", 2, ["odma inner work: Got unexpected extra argument(s) (more)"]),
        ("inner play", 2, ["odma inner: No such command 'play'."]),
        ("outer", 2, ["odma: No such command 'outer'."]),
    ],
)
def test_a_failure_is_a_line_and_a_code(command, code, said):
    ran = CliRunner().invoke(app, command.split())
    assert (ran.exit_code, ran.stderr.splitlines()) == (code, said)
    assert ran.stdout == ""


def test_a_bug_is_no_failure():
    @inner.command()
    def bug() -> None:
        raise KeyError

    assert isinstance(CliRunner().invoke(app, ["inner", "bug"]).exception, KeyError)
