"""`odma web`: a page that shows the pools of a service in a browser of this machine."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Annotated

import typer

from odma_service.cli.options import Connection, connecting
from odma_service.errors import OdmaError

app = typer.Typer()


@app.command()
@connecting
def command(
    connection: Connection,
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Of the loopback. 0: a free one.")
    ] = 8050,
) -> None:
    """Serve a page with maps of the pools on the loopback, until Ctrl-C.

    Whoever can open a connection to this machine's loopback sees what the token may see.
    """
    if not (find_spec("starlette") and find_spec("uvicorn")):
        raise OdmaError("odma web needs starlette and uvicorn: pip install 'odma-service[web]'")
    from odma_service.web import listener, serve

    with (
        listener(port) as at,
        connection.client() as service,
        connection.client(retry_seconds=math.inf) as watcher,
    ):
        host, taken = at.getsockname()
        typer.echo(f"the page: http://{host}:{taken}/")
        serve(at, service, watcher, connection.target)
