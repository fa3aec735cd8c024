"""`odma` and `python -m odma_service`. A failure is one line on stderr, exit code 2."""

from __future__ import annotations

import sys
from typing import Any

import typer

from odma_service.cli import app
from odma_service.errors import OdmaError

UsageError: Any = typer.BadParameter.__base__
"""What a wrong command line raises; typer does not export it."""


def main() -> None:
    """Run the command that sys.argv asks for, and exit."""
    try:
        code = app(standalone_mode=False)
    except OdmaError as error:
        code = _fail(str(error))
    except UsageError as error:
        code = _fail(error.format_message())
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _fail(message: str) -> int:
    if message:  # there is none where the help was printed
        typer.echo(f"odma: {' '.join(message.split())}", err=True)
    return 2


if __name__ == "__main__":
    main()
