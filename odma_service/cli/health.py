"""`odma health`: a probe. It runs every few seconds, so it imports little."""

from __future__ import annotations

from typing import Annotated

import typer

from odma_service.cli.failures import BAD, bad_result
from odma_service.cli.options import Connection, connecting
from odma_service.errors import ServiceError

app = typer.Typer()


@app.command()
@connecting
def command(
    connection: Connection,
    service: Annotated[
        str, typer.Option(help="A service's name, or odma.alive. Empty: all services together.")
    ] = "",
) -> None:
    """Ask if the service serves. Exit code 1: it drains, or it does not answer.

    odma.alive serves while the service drains, too.
    """
    with bad_result(ServiceError), connection.client() as client:
        serving = client.is_serving(service)
    typer.echo("serving" if serving else "not serving")
    raise typer.Exit(0 if serving else BAD)
