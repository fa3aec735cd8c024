"""Groups of commands that are imported when they are asked for.

A command is a module with an `app`. Those of `lab` need a source tree: they are found beside the
package, never by what else is called `lab` on the machine.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from odma_service.errors import OdmaError

LAB = "lab"
SOURCE_TREE = Path(__file__).resolve().parents[2]


def lazily(table: Mapping[str, str]) -> type[TyperGroup]:
    """Return a kind of group with commands by name: the modules that hold them."""

    class Lazy(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return [*super().list_commands(ctx), *table]

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            if cmd_name not in table:
                return super().get_command(ctx, cmd_name)
            command: Any = get_command(_app_of(table[cmd_name]))
            command.name = cmd_name
            return command

    return Lazy


def _app_of(module: str) -> typer.Typer:
    if module.partition(".")[0] == LAB and not _find_lab():
        return _absent
    app: typer.Typer = import_module(module).app
    return app


def _find_lab() -> bool:
    """Make `lab` importable if the package lies in a source tree."""
    folder = SOURCE_TREE / LAB
    if LAB not in sys.modules:
        spec = spec_from_file_location(
            LAB, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None or not (folder / "__init__.py").exists():
            return False
        sys.modules[LAB] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[LAB])
    return True


_absent = typer.Typer()


@_absent.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def _explain(ctx: typer.Context) -> None:
    """Needs a source tree of ODMA."""
    raise OdmaError(
        f"{ctx.command_path} measures a source tree and is in no package: run it in a clone of ODMA"
    )
