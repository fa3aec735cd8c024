"""`odma bench`: what the service costs, and what it survives."""

from __future__ import annotations

import typer

from odma_service.cli.lazy import lazily

COMMANDS = {
    "arena": "lab.bench.arena",
    "rpc": "lab.bench.rpc",
    "predictor": "lab.bench.predictor",
    "replay": "lab.bench.replay",
    "tenants": "lab.bench.tenants",
    "torture": "lab.robustness.torture",
    "soak": "lab.robustness.soak",
}

app = typer.Typer(
    cls=lazily(COMMANDS),
    no_args_is_help=True,
    help="Measure, and kill, what the service rests on. Each command prints JSON if asked.",
)


@app.callback()
def _bench() -> None:
    pass
