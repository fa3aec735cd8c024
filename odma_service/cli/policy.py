"""`odma policy`: the record that decides lengths and admission, shown and changed."""

from __future__ import annotations

from typing import Annotated

import typer

from odma_service.cli import view
from odma_service.cli.lazy import Commands
from odma_service.cli.options import AsJson, Connection, Tenants, connecting, tenant_of
from odma_service.cli.output import object_of, show
from odma_service.cli.pool import Name
from odma_service.errors import InvalidError
from odma_service.values import PolicyChange

app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Show a pool's policy, or change some of it."
)


@app.command("show")
@connecting
def show_one(connection: Connection, name: Name, as_json: AsJson = False) -> None:
    """Show the policy in force, with the shares of tenants."""
    with connection.client() as service:
        policy = service.get_pool(name).policy
    show(object_of(policy), as_json, lambda _: view.policy(policy))


@app.command("set")
@connecting
def set_one(
    connection: Connection,
    name: Name,
    record: Annotated[
        str, typer.Option(help="Start from this record: static, s3, odma or elastic.")
    ] = "",
    safety_share: Annotated[
        float | None, typer.Option(help="Share of the memory closed to admission, 0 to 0.9.")
    ] = None,
    overflow_risk: Annotated[
        float | None, typer.Option(help="Accepted probability to outgrow a first region, 0 to 1.")
    ] = None,
    unsure_ratio: Annotated[
        float | None, typer.Option(help="q95 / q50 above which a prediction is unsure; 0: never.")
    ] = None,
    growth: Annotated[
        float | None, typer.Option(help="Factor on a length that was too short, 1 to 4.")
    ] = None,
    step_tokens: Annotated[
        int | None, typer.Option(help="Lengths are multiples of this where no limit fits.")
    ] = None,
    limit: Annotated[
        list[int] | None, typer.Option(help="A bucket limit in tokens; repeat it, ascending.")
    ] = None,
    clear_limits: Annotated[
        bool, typer.Option("--clear-limits", help="No buckets any more.")
    ] = False,
    max_copy_tokens: Annotated[
        int | None, typer.Option(help="Most tokens that one batch copies, if it does not say.")
    ] = None,
    tenant: Tenants = None,
    clear_tenants: Annotated[
        bool, typer.Option("--clear-tenants", help="No shares by name any more.")
    ] = False,
    tenant_share: Annotated[
        float | None, typer.Option(help="Most of the memory for a tenant without a share, 0 to 1.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change the policy of an open pool; regions stay as they are.

    What is not given stays; --tenant replaces all tenants. If somebody else changes the policy
    at the same time, nothing is done.
    """
    change = PolicyChange(
        record,
        step_tokens,
        limit or (),
        clear_limits,
        overflow_risk,
        safety_share,
        unsure_ratio,
        growth,
        tenant_share,
        max_copy_tokens,
        tuple(map(tenant_of, tenant or ())),
        clear_tenants,
    )
    if change == PolicyChange():
        raise InvalidError("policy", "nothing to change is given; see --help")
    with connection.client() as service:
        pool = service.get_pool(name)
        policy = service.set_policy(pool.summary.pool, change, expected_version=pool.policy.version)
    show(object_of(policy), as_json, lambda _: view.policy(policy))
