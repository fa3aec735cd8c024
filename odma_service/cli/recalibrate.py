"""`odma recalibrate`: bucket limits found anew from the lengths that a pool has seen."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import RenderableType
from rich.table import Table

from odma_service.cli.options import AsJson, Connection, connecting
from odma_service.cli.output import object_of, show
from odma_service.cli.pool import Name
from odma_service.rpc.v1 import memory_service_pb2 as pb

app = typer.Typer()


@app.command()
@connecting
def command(
    connection: Connection,
    name: Name,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compare and report; change nothing.")
    ] = False,
    limits: Annotated[
        int, typer.Option(min=0, max=16, help="How many limits. 0: as many as there are, or 8.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Find the bucket limits that would have cost least on the lengths seen, and install them."""
    with connection.client() as service:
        pool = service.get_pool(name)
        report = service.recalibrate(
            pool.summary.pool,
            expected_version=pool.policy.version,
            dry_run=dry_run,
            limits=limits,
        )
    show(object_of(report), as_json, lambda _: _picture(report))


def _picture(report: pb.RecalibrateResponse) -> RenderableType:
    done = f"installed, policy version {report.policy_version}"
    title = (
        f"{done if report.installed else 'not installed'}, {report.completions:,.0f} completions"
    )
    table = Table("", "before", "after", title=title, title_justify="left")
    both = (report.before, report.after)
    table.add_row("bucket limits", *(" ".join(map(str, one.limits_tokens)) for one in both))
    table.add_row("tokens wasted a request", *(f"{one.waste_tokens:,.1f}" for one in both))
    table.add_row("utilisation", *(f"{one.utilisation:.1%}" for one in both))
    return table
