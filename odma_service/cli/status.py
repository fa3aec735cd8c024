"""`odma status`: what pools there are, or one pool as a picture."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console, RenderableType

from odma_service.cli import view
from odma_service.cli.options import DEFAULT_TARGET, Ca, Cert, Key, Target, connect

app = typer.Typer()


@app.command()
def command(
    pool: Annotated[str | None, typer.Argument(help="A pool. Without it: a list of all.")] = None,
    target: Target = DEFAULT_TARGET,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    regions: Annotated[bool, typer.Option("--regions", help="List the regions too.")] = False,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
) -> None:
    """Show what pools there are, or one pool as a picture."""
    with connect(target, ca, cert, key) as service:
        if pool is None:
            pools = service.list_pools()
            _show(_dict(pools) if as_json else view.list_of(pools.pools))
            return
        facts, books = service.get_pool(pool), service.list_regions(pool)
    if as_json:
        listed = {"regions": [_dict(region) for region in books]} if regions else {}
        _show(_dict(facts) | listed)
        return
    _show(view.picture(facts, books, Console().width))
    if regions:
        _show(view.list_of_regions(books))


def _show(what: RenderableType | dict[str, Any]) -> None:
    if isinstance(what, dict):
        typer.echo(json.dumps(what))
    else:
        Console().print(what)


def _dict(message: Message) -> dict[str, Any]:
    """Return a message as JSON has it, with the names of the proto and without gaps."""
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
