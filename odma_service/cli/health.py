"""`odma health`: a probe, run every few seconds. So it imports little, and can be all there is."""

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
        str, typer.Option(help="A service, or odma.alive; empty: all together.")
    ] = "",
) -> None:
    """Exit with 0 if the service is serving, else with 1: it drains, or does not answer.

    odma.alive is serving while the service drains, too.
    """
    with bad_result(ServiceError), connection.client() as client:
        serving = client.is_serving(service)
    typer.echo("serving" if serving else "not serving")
    raise typer.Exit(0 if serving else BAD)
