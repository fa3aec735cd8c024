"""Configuration of the server: flags, then environment, then a TOML file, then defaults.

    flag          environment      TOML
    --pool-dir    ODMA_POOL_DIR    pool-dir = "/run/odma"

A setting has one name, spelt as each place spells names. An unknown one is an error in all
three: a mistyped setting would otherwise be found when it hurts. Lists are arrays in
TOML, repeated flags, and separated by commas in the environment.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from odma_service.errors import InvalidError
from odma_service.service.door.private import insist_trusted

PREFIX = "ODMA_"
NOT_SETTINGS = {
    "ODMA_CLIENT_CA",
    "ODMA_CLIENT_CERT",
    "ODMA_CLIENT_KEY",
    "ODMA_CLIENT_TLS",
    "ODMA_DATA_DIR",
    "ODMA_REFERENCE_DIR",
    "ODMA_REQUIRE_CLIENTS",
    "ODMA_TOKEN",
}
"""Variables with our prefix for other tools of the project."""

SERVICE_LINK = re.compile(
    r"ODMA(_[A-Z0-9_]+)?_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?"
    r"|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
LINKED_PORT = re.compile(r"ODMA(_[A-Z0-9_]+)?_PORT=(tcp|udp|sctp)://.*")
"""What Kubernetes puts into every container for a Service whose name begins with `odma`."""

UNIX = "unix:"
HOST_AND_PORT = re.compile(r"(\[[^\[\]]+\]|[^\[\]:\s]+):(?P<port>[0-9]{1,5})")
LONGEST_UNIX_PATH_BYTES = 107


def _default_pool_dir() -> Path:
    """Return a directory of this user's own, on tmpfs where the system offers one."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "odma"
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "odma"


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _check_address(address: str) -> str:
    """Return `address` if it reads host:port, [host]:port or unix:/path."""
    if address.startswith(UNIX):
        path = address.removeprefix(UNIX)
        if not path.startswith("/") or len(os.fsencode(path)) > LONGEST_UNIX_PATH_BYTES:
            raise ValueError(
                f"{address!r}: the path must be absolute and at most "
                f"{LONGEST_UNIX_PATH_BYTES} bytes long"
            )
        return address
    match = HOST_AND_PORT.fullmatch(address)
    if not match or int(match["port"]) >= 1 << 16:
        raise ValueError(f"{address!r} is not host:port, [host]:port or unix:/path")
    return address


def _check_metrics_address(address: str) -> str:
    """Return `address` if it reads host:port or [host]:port, or is empty."""
    if not address or (not address.startswith(UNIX) and _check_address(address)):
        return address
    raise ValueError(f"{address!r} is not host:port or [host]:port")


class Settings(BaseSettings):
    """The settings of a server. Times are seconds."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    config: Annotated[
        Path | None, Field(description="TOML file with any of these settings, named as here.")
    ] = None
    listen: Annotated[
        tuple[Annotated[str, AfterValidator(_check_address)], ...],
        NoDecode,
        BeforeValidator(_split),
        Field(
            min_length=1,
            description="host:port or unix:/path; may be given several times. Port 0: a free one.",
        ),
    ] = ("127.0.0.1:50051",)
    pool_dir: Annotated[
        Path,
        AfterValidator(Path.expanduser),
        Field(
            default_factory=_default_pool_dir,
            description="Directory of the pools' books, of this server alone; tmpfs is best.",
        ),
    ]
    wait_for_pool_dir: Annotated[
        bool,
        Field(
            description="Wait until the server that has pool-dir is gone; else that is an error."
        ),
    ] = False
    reflection: Annotated[bool, Field(description="Offer gRPC server reflection.")] = False
    max_pools: Annotated[
        int,
        Field(
            ge=1, le=1024, description="Pools kept. The oldest closed one makes room for a new one."
        ),
    ] = 64
    max_pool_bytes: Annotated[
        int,
        Field(ge=1 << 20, le=2**50, description="Bytes of all pools' files together."),
    ] = 2 * 1024**3
    workers: Annotated[int, Field(ge=1, le=256, description="Most threads that answer calls.")] = 64
    predictor_model: Annotated[
        str,
        Field(
            min_length=1,
            description="Directory of the model that predicts lengths, looked at for a new one "
            "every other second. shipped: our own; none: the live histograms.",
        ),
    ] = "shipped"
    non_commercial_model: Annotated[
        bool,
        Field(description="Serve a model, too, that was trained on non-commercial data."),
    ] = False
    drain_seconds: Annotated[
        float,
        Field(ge=0, le=600, allow_inf_nan=False, description="Wait so long for calls at shutdown."),
    ] = 5.0
    metrics_listen: Annotated[
        str,
        AfterValidator(_check_metrics_address),
        Field(description="host:port where Prometheus scrapes metrics over HTTP; empty: nowhere."),
    ] = ""
    decision_log: Annotated[
        Path | None,
        Field(description="File for one JSON line about each request that ends."),
    ] = None
    decision_log_bytes: Annotated[
        int,
        Field(ge=4096, le=2**40, description="Size at which the decision log's file is rotated."),
    ] = 64 * 1024 * 1024
    decision_log_sketches: Annotated[
        bool,
        Field(
            description="Put what the model makes of each prompt into the decision log, for "
            "training. Short prompts can be read from it: see docs/guides/security.md."
        ),
    ] = False
    traces: Annotated[
        bool,
        Field(description="Send OpenTelemetry traces where the OTEL_* variables say (extra otel)."),
    ] = False
    log_format: Annotated[
        Literal["console", "json"], Field(description="Log lines for people or for machines.")
    ] = "console"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="Least severity logged.")
    ] = "info"
    tls_cert: Annotated[
        Path | None, Field(description="PEM file with the certificate chain of the TCP listeners.")
    ] = None
    tls_key: Annotated[
        Path | None, Field(description="PEM file with its private key, for this user alone.")
    ] = None
    tls_client_ca: Annotated[
        Path | None, Field(description="PEM file: clients need a certificate signed by one of it.")
    ] = None
    token_file: Annotated[
        Path | None,
        Field(description="TOML file of who may call what; see docs/guides/security.md."),
    ] = None
    allow_insecure: Annotated[
        bool, Field(description="Listen beyond the loopback without TLS or without identities.")
    ] = False
    max_owner_pools: Annotated[
        int, Field(ge=1, le=1024, description="Pools kept for one identity of the token file.")
    ] = 16
    max_calls: Annotated[
        int, Field(ge=1, le=65_536, description="Calls answered or waiting at once.")
    ] = 1024

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put the sources in order; flags or environment name the file."""
        file = init_settings().get("config") or env_settings().get("config")
        file_settings = InitSettingsSource(settings_cls, _read(Path(file)) if file else {})
        return init_settings, env_settings, file_settings


def load(flags: Mapping[str, Any]) -> Settings:
    """Return the settings, with `flags` by field name before all else.

    Raises InvalidError that names the flag, variable or key, and the rule that it breaks.
    """
    _check_environment()
    try:
        return Settings(**flags)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidError(_where(field, flags), f"{message} (given: {first['input']!r})") from None


def _where(field: str, flags: Mapping[str, Any]) -> str:
    """Return the source of a bad value."""
    if field in flags:
        return f"--{_kebab(field)}"
    variable = PREFIX + field.upper()
    return variable if variable in os.environ else f"key {_kebab(field)!r} of the TOML file"


def _check_environment() -> None:
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    for variable in sorted(os.environ):
        if _is_service_link(variable) or variable in known | NOT_SETTINGS:
            continue
        if variable.upper().startswith(PREFIX):
            raise InvalidError(variable, _unknown("environment variable", variable.upper(), known))


def _is_service_link(variable: str) -> bool:
    linked = f"{variable}={os.environ[variable]}"
    return bool(SERVICE_LINK.fullmatch(variable) or LINKED_PORT.fullmatch(linked))


def _read(file: Path) -> dict[str, Any]:
    """Return the file's settings by field name. Raises InvalidError."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidError("config", f"cannot read {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidError("config", f"{file} is not TOML: {error}") from None
    insist_trusted(file)
    known = {_kebab(field) for field in Settings.model_fields} - {"config"}
    for key in table:
        if key not in known:
            raise InvalidError(f"{file}: {key}", _unknown("key", key, known))
    return {key.replace("-", "_"): value for key, value in table.items()}


def _unknown(kind: str, name: str, known: set[str]) -> str:
    near = get_close_matches(name, sorted(known), cutoff=0.7)
    guess = (
        f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(known))}"
    )
    return f"unknown {kind}; {guess}"


def _kebab(field: str) -> str:
    return field.replace("_", "-")
