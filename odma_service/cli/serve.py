"""`odma serve`: run the service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from odma_service.service import config, server

app = typer.Typer()


def _flag(field: str, *names: str) -> Any:
    """Return the option of a setting, described where the setting is."""
    info = config.Settings.model_fields[field]
    default = info.get_default(call_default_factory=True, validated_data={})
    shown = ", ".join(default) if isinstance(default, tuple) else default
    return typer.Option(*names, help=info.description, show_default=shown and str(shown))


@app.command()
def command(
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
