"""`odma health`: a probe, run every few seconds. So it imports little, and can be all there is."""

from __future__ import annotations

from typing import Annotated

import typer

from odma_service.cli.options import DEFAULT_TARGET, Ca, Cert, Key, Target, connect
from odma_service.errors import ServiceError

app = typer.Typer()


@app.command()
def command(
    target: Target = DEFAULT_TARGET,
    service: Annotated[
        str, typer.Option(help="A service, or odma.alive; empty: all together.")
    ] = "",
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
) -> None:
    """Exit with 0 if the service is serving, else with 1: it drains, or does not answer.

    odma.alive is serving while the service drains, too.
    """
    try:
        with connect(target, ca, cert, key) as client:
            serving = client.is_serving(service)
    except ServiceError as error:
        typer.echo(f"odma health: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo("serving" if serving else "not serving")
    raise typer.Exit(0 if serving else 1)
