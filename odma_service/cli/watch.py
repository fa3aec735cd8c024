"""`odma watch`: events of pools as they happen, one line each."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated

import typer

from odma_service.cli.options import DEFAULT_TARGET, Ca, Cert, Key, Target, connect
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb

RECONNECT_SECONDS = 30.0
LOST = "events were lost"


app = typer.Typer()


@app.command()
def command(
    pool: Annotated[str, typer.Argument(help="A pool. Without it: all of them.")] = "",
    target: Target = DEFAULT_TARGET,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    count: Annotated[int, typer.Option(min=0, help="Stop after so many events; 0: never.")] = 0,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
) -> None:
    """Print what happens to pools, from now on. Goes on when the service comes back."""
    told = 0
    with connect(target, ca, cert, key, retry_seconds=RECONNECT_SECONDS) as service:
        for answer in service.watch(pool):
            if answer.lost:
                typer.echo(json.dumps({"lost": True}) if as_json else LOST)
            if not answer.HasField("event"):
                continue
            facts = facts_of(answer.event)
            typer.echo(json.dumps(facts) if as_json else line_of(answer.event))
            told += 1
            if told == count:
                return


def kind_of(event: pool_pb.Event) -> str:
    """Return the kind of an event in lower case, also one that this version does not know."""
    known = {number: name for name, number in pool_pb.EventKind.items()}
    return known.get(event.kind, f"kind_{event.kind}").removeprefix("EVENT_KIND_").lower()


def facts_of(event: pool_pb.Event) -> dict[str, str | int | float]:
    """Return an event as JSON has it."""
    return {
        "unix_seconds": event.unix_seconds,
        "kind": kind_of(event),
        "pool": event.pool.name,
        "epoch": event.pool.epoch,
        "policy_version": event.policy_version,
        "reason": event.reason,
    }


def line_of(event: pool_pb.Event) -> str:
    """Return an event as one printable line, in UTC."""
    at = datetime.fromtimestamp(event.unix_seconds, UTC)
    line = f"{at:%H:%M:%S}  {event.pool.name:<16} {kind_of(event):<13} {event.reason}".rstrip()
    return "".join(c if c.isprintable() else " " for c in line)
