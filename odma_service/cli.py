"""The commands of `odma`: serve, look, demonstrate. What runs them is in __main__.py."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console, RenderableType

from odma_service import (
    arena_cli,
    bench,
    config,
    lpddr_cli,
    predictor_cli,
    server,
    status,
    trace_cli,
)
from odma_service.connect import DEFAULT_TARGET, Ca, Cert, Key, Target, connect
from odma_service.demo.command import demo_command
from odma_service.health_cli import health_command
from odma_service.replay_cli import replay_command, tune_command
from odma_service.reproduce_cli import reproduce_command
from odma_service.top import top_command
from odma_service.watch_cli import watch_command

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Decides where each request's KV cache lives, for LLM engines that need it contiguous.",
)
app.add_typer(trace_cli.app, name="trace")
app.add_typer(bench.app, name="bench")
app.add_typer(arena_cli.app, name="arena")
app.add_typer(lpddr_cli.app, name="lpddr")
app.add_typer(predictor_cli.app, name="predictor")
app.command("demo")(demo_command)
app.command("health")(health_command)
app.command("replay")(replay_command)
app.command("tune")(tune_command)
app.command("reproduce")(reproduce_command)
app.command("watch")(watch_command)
app.command("top")(top_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"odma {version('odma-service')}")
        raise typer.Exit


@app.callback()
def _common(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def _flag(field: str, *names: str) -> Any:
    """Return the option of a setting, described where the setting is."""
    info = config.Settings.model_fields[field]
    default = info.get_default(call_default_factory=True, validated_data={})
    shown = ", ".join(default) if isinstance(default, tuple) else default
    return typer.Option(*names, help=info.description, show_default=shown and str(shown))


@app.command()
def serve(
    config_file: Annotated[Path | None, _flag("config", "--config")] = None,
    listen: Annotated[list[str] | None, _flag("listen")] = None,
    pool_dir: Annotated[Path | None, _flag("pool_dir")] = None,
    reflection: Annotated[bool | None, _flag("reflection")] = None,
    max_pools: Annotated[int | None, _flag("max_pools")] = None,
    workers: Annotated[int | None, _flag("workers")] = None,
    predictor_model: Annotated[str | None, _flag("predictor_model")] = None,
    non_commercial_model: Annotated[bool | None, _flag("non_commercial_model")] = None,
    drain_seconds: Annotated[float | None, _flag("drain_seconds")] = None,
    metrics_listen: Annotated[str | None, _flag("metrics_listen")] = None,
    decision_log: Annotated[Path | None, _flag("decision_log")] = None,
    decision_log_bytes: Annotated[int | None, _flag("decision_log_bytes")] = None,
    decision_log_sketches: Annotated[bool | None, _flag("decision_log_sketches")] = None,
    traces: Annotated[bool | None, _flag("traces")] = None,
    log_format: Annotated[str | None, _flag("log_format")] = None,
    log_level: Annotated[str | None, _flag("log_level")] = None,
    tls_cert: Annotated[Path | None, _flag("tls_cert")] = None,
    tls_key: Annotated[Path | None, _flag("tls_key")] = None,
    tls_client_ca: Annotated[Path | None, _flag("tls_client_ca")] = None,
    token_file: Annotated[Path | None, _flag("token_file")] = None,
    allow_insecure: Annotated[bool | None, _flag("allow_insecure")] = None,
    max_owner_pools: Annotated[int | None, _flag("max_owner_pools")] = None,
    max_calls: Annotated[int | None, _flag("max_calls")] = None,
) -> None:
    """Run the service until SIGTERM or SIGINT.

    Each flag is also a variable (ODMA_POOL_DIR) and a key of the TOML file (pool-dir). Flags
    win over variables, variables over the file. When it serves, it prints one line on stdout:
    "odma ready on ADDRESS, ...".
    """
    flags = {
        "config": config_file,
        "listen": listen,
        "pool_dir": pool_dir,
        "reflection": reflection,
        "max_pools": max_pools,
        "workers": workers,
        "predictor_model": predictor_model,
        "non_commercial_model": non_commercial_model,
        "drain_seconds": drain_seconds,
        "metrics_listen": metrics_listen,
        "decision_log": decision_log,
        "decision_log_bytes": decision_log_bytes,
        "decision_log_sketches": decision_log_sketches,
        "traces": traces,
        "log_format": log_format,
        "log_level": log_level,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "tls_client_ca": tls_client_ca,
        "token_file": token_file,
        "allow_insecure": allow_insecure,
        "max_owner_pools": max_owner_pools,
        "max_calls": max_calls,
    }
    server.run(config.load({name: value for name, value in flags.items() if value is not None}))


@app.command("status")
def show_status(
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
            _show(_dict(pools) if as_json else status.list_of(pools.pools))
            return
        facts, books = service.get_pool(pool), service.list_regions(pool)
    if as_json:
        listed = {"regions": [_dict(region) for region in books]} if regions else {}
        _show(_dict(facts) | listed)
        return
    _show(status.picture(facts, books, Console().width))
    if regions:
        _show(status.list_of_regions(books))


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
