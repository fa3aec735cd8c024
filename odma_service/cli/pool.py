"""`odma pool`: the pools, one of them, and what an operator does with them."""

from __future__ import annotations

from typing import Annotated

import typer

from odma_service.cli.lazy import Commands
from odma_service.cli.options import AsJson, Connection, connecting
from odma_service.cli.status import list_pools, show_pool
from odma_service.errors import OdmaError
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb

app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="List pools, show one, close one, forget a closed one."
)

Name = Annotated[str, typer.Argument(metavar="POOL", help="The pool's name.")]


@app.command("list")
@connecting
def list_all(connection: Connection, as_json: AsJson = False) -> None:
    """List the pools, as odma status does."""
    with connection.client() as service:
        list_pools(service, as_json)


@app.command()
@connecting
def show(connection: Connection, name: Name, as_json: AsJson = False) -> None:
    """Show a pool as a picture, as odma status POOL does."""
    with connection.client() as service:
        show_pool(service, name, as_json)


@app.command()
@connecting
def close(
    connection: Connection,
    name: Name,
    live: Annotated[
        bool, typer.Option("--live", help="Also if its owner was heard of within its ttl_seconds.")
    ] = False,
) -> None:
    """End the pool's epoch: its engine is told EPOCH_OVER and has to open it again.

    Only when nothing runs any more that uses the pool's memory. A closed pool stays closed.
    """
    with connection.client() as service:
        pool = service.get_pool(name).summary
        if pool.state == pool_pb.POOL_STATE_OPEN and not live:
            raise OdmaError(
                f"the owner of {name!r} called {pool.idle_seconds:.1f} s ago; stop the engine "
                "first, or close its pool all the same with --live"
            )
        service.close_pool(pool.pool)
    typer.echo(f"closed {name}, epoch {pool.pool.epoch}")


@app.command()
@connecting
def forget(connection: Connection, name: Name) -> None:
    """Remove a closed pool: its file and what it has learnt, lengths and policy."""
    with connection.client() as service:
        service.forget_pool(service.get_pool(name).summary.pool)
    typer.echo(f"forgot {name}")
