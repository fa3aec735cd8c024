"""`odma status`: a list of the pools, or one pool as a picture."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType

from odma_service.cli import view
from odma_service.cli.options import AsJson, Connection, connecting
from odma_service.cli.output import object_of, show
from odma_service.client import Client
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb

app = typer.Typer()


@app.command()
@connecting
def command(
    connection: Connection,
    pool: Annotated[str | None, typer.Argument(help="A pool. Without it: a list of all.")] = None,
    as_json: AsJson = False,
    regions: Annotated[bool, typer.Option("--regions", help="List the regions too.")] = False,
) -> None:
    """List the pools, or show one as a picture."""
    with connection.client() as service:
        if pool is None:
            list_pools(service, as_json)
        else:
            show_pool(service, pool, as_json, regions=regions)


def list_pools(service: Client, as_json: bool) -> None:
    """Print a line about each pool."""
    pools = service.list_pools()
    show(object_of(pools), as_json, lambda _: view.list_of(pools.pools))


def show_pool(service: Client, pool: str, as_json: bool, *, regions: bool = False) -> None:
    """Print all about a pool, with its regions if they are wanted. Raises PoolNotFoundError."""
    report, books = service.get_pool(pool), service.list_regions(pool)
    listed = {"regions": [object_of(region) for region in books]} if regions else {}
    show(object_of(report) | listed, as_json, lambda _: _picture(report, books, regions))


def _picture(
    report: pool_pb.GetPoolResponse, books: list[pool_pb.Region], regions: bool
) -> RenderableType:
    picture = view.picture(report, books, Console().width)
    return Group(picture, view.list_of_regions(books)) if regions else picture
