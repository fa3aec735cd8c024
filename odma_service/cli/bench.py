"""`odma bench`: the costs of the service, and the deaths it survives."""

from __future__ import annotations

import typer

from odma_service.cli.lazy import lazily

COMMANDS = {
    "arena": "lab.bench.arena",
    "rpc": "lab.bench.rpc",
    "engine": "lab.bench.engine",
    "predictor": "lab.bench.predictor",
    "readers": "lab.bench.readers",
    "replay": "lab.bench.replay",
    "strangers": "lab.bench.strangers",
    "tenants": "lab.bench.tenants",
    "torture": "lab.robustness.torture",
    "soak": "lab.robustness.soak",
}

app = typer.Typer(
    cls=lazily(COMMANDS),
    no_args_is_help=True,
    help="Measure the parts of the service, and kill them at work. Every command takes --json.",
)


@app.callback()
def _bench() -> None:
    pass
