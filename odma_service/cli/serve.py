"""`odma serve`: run the service."""

from __future__ import annotations

from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer
from pydantic.fields import FieldInfo

from odma_service.service import config, server

app = typer.Typer()


def command(**flags: Any) -> None:
    """Run the service until SIGTERM or SIGINT.

    Each flag is also a variable (ODMA_POOL_DIR) and a key of the TOML file (pool-dir). Flags
    win over variables, variables over the file. When it serves, it prints one line on stdout:
    "odma ready on ADDRESS, ...".
    """
    server.run(config.load({name: value for name, value in flags.items() if value is not None}))


def _flag(name: str, field: FieldInfo) -> Parameter:
    """Return the option of a setting, described where the setting is; None: it is not given."""
    default = field.get_default(call_default_factory=True, validated_data={})
    shown = ", ".join(default) if isinstance(default, tuple) else default
    told = f"{field.description} Default: {shown}." if shown not in (None, "", False) else None
    several = isinstance(default, tuple)
    option = typer.Option(
        help=told or field.description, show_default=False, metavar="<str>" if several else None
    )
    given: Any = Annotated[_parsed(field.annotation) | None, option]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=given)


def _parsed(annotation: Any) -> Any:
    """Return the type that the command line makes of a setting's; the settings check the rest."""
    if get_origin(annotation) is tuple:
        return list[str]
    if annotation == Path | None:
        return Path
    return annotation if annotation in {bool, int, float, Path} else str


fields = config.Settings.model_fields
command.__signature__ = Signature([_flag(*item) for item in fields.items()])  # type: ignore[attr-defined]
app.command()(command)
