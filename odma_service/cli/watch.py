"""`odma watch`: events of pools as they happen, one line each."""

from __future__ import annotations

from typing import Annotated

import typer

from odma_service.cli import view
from odma_service.cli.options import AsJson, Connection, connecting
from odma_service.cli.output import Facts, show
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb

RECONNECT_SECONDS = 30.0
app = typer.Typer()


@app.command()
@connecting
def command(
    connection: Connection,
    pool: Annotated[str, typer.Argument(help="A pool. Without it: all of them.")] = "",
    as_json: AsJson = False,
    count: Annotated[int, typer.Option(min=0, help="Stop after this many events. 0: never.")] = 0,
) -> None:
    """Print events of pools from now on, also those after a restart of the service."""
    told = 0
    with connection.client(retry_seconds=RECONNECT_SECONDS) as service:
        for answer in service.watch(pool):
            if answer.lost:
                show({"lost": True}, as_json, view.LOST)
            if not answer.HasField("event"):
                continue
            event = answer.event
            show(facts_of(event), as_json, view.line_of(event))
            told += 1
            if told == count:
                return


def facts_of(event: pool_pb.Event) -> Facts:
    """Return an event as JSON has it."""
    return {
        "unix_seconds": event.unix_seconds,
        "kind": view.kind_of(event),
        "pool": event.pool.name,
        "epoch": event.pool.epoch,
        "policy_version": event.policy_version,
        "reason": event.reason,
    }
