"""`odma bench`: what the library costs, and what it survives. Each command prints JSON if asked."""

from __future__ import annotations

import typer

from odma_service.bench.arena import arena_command
from odma_service.bench.predictor import predictor_command
from odma_service.bench.replay import replay_command
from odma_service.bench.rpc import rpc_command
from odma_service.bench.soak import soak_command
from odma_service.bench.tenants import tenants_command
from odma_service.bench.torture import torture_command

app = typer.Typer(no_args_is_help=True, help="Measure, and kill, what the service rests on.")
app.command("arena")(arena_command)
app.command("predictor")(predictor_command)
app.command("replay")(replay_command)
app.command("rpc")(rpc_command)
app.command("soak")(soak_command)
app.command("tenants")(tenants_command)
app.command("torture")(torture_command)
