"""The commands of `odma`: one file a command. What runs them is in __main__.py."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from odma_service.cli.lazy import lazily

COMMANDS = {
    "serve": "odma_service.cli.serve",
    "status": "odma_service.cli.status",
    "top": "odma_service.cli.top",
    "watch": "odma_service.cli.watch",
    "health": "odma_service.cli.health",
    "demo": "odma_service.cli.demo",
    "trace": "odma_service.cli.trace",
    "replay": "odma_service.cli.replay",
    "tune": "odma_service.cli.tune",
    "reproduce": "lab.paper.command",
    "predictor": "odma_service.cli.predictor",
    "lpddr": "odma_service.cli.lpddr",
    "arena": "odma_service.cli.arena",
    "bench": "odma_service.cli.bench",
}
"""In the order of the help."""

app = typer.Typer(
    cls=lazily(COMMANDS),
    no_args_is_help=True,
    add_completion=False,
    help="Decides where each request's KV cache lives, for LLM engines that need it contiguous.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"odma {version('odma-service')}")
        raise typer.Exit


@app.callback()
def _common(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass
