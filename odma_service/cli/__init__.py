"""The commands of `odma`: one file a command. __main__.py runs them; failures.py ends them."""

from __future__ import annotations

from typing import Annotated

import typer

from odma_service import __version__
from odma_service.cli.failures import EXIT_CODES
from odma_service.cli.lazy import lazily

COMMANDS = {
    "serve": "odma_service.cli.serve",
    "status": "odma_service.cli.status",
    "top": "odma_service.cli.top",
    "watch": "odma_service.cli.watch",
    "web": "odma_service.cli.web",
    "health": "odma_service.cli.health",
    "pool": "odma_service.cli.pool",
    "policy": "odma_service.cli.policy",
    "recalibrate": "odma_service.cli.recalibrate",
    "demo": "odma_service.cli.demo",
    "generate": "odma_service.cli.generate",
    "serve-model": "odma_service.cli.serve_model",
    "geometry": "odma_service.cli.geometry",
    "trace": "odma_service.cli.trace",
    "plan": "odma_service.cli.plan",
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
    name="odma",
    cls=lazily(COMMANDS),
    no_args_is_help=True,
    add_completion=True,
    help="Decides where each request's KV cache lives, for LLM engines that need it contiguous.",
    epilog=EXIT_CODES,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"odma {__version__}")
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
