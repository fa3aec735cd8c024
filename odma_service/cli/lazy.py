"""Groups of commands: a command is imported when it is asked for, and its failure is one line.

A command is a module with an `app`. Those of `lab` need a source tree: they are found beside the
package, never by what else is called `lab` on the machine.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import typer
from typer.core import TyperGroup
from typer.main import get_command

from odma_service.cli.failures import CommandError, exit_code_of
from odma_service.errors import OdmaError

LAB = "lab"
COMPLETION = ("install_completion", "show_completion")
SOURCE_TREE = Path(__file__).resolve().parents[2]


class Commands(TyperGroup):
    """Commands of this module, and those of a table: modules by the names of their commands."""

    table: ClassVar[Mapping[str, str]] = {}

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.rich_markup_mode = None

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *self.table]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command: Any = super().get_command(ctx, cmd_name)
        if cmd_name in self.table:
            command = get_command(_app_of(self.table[cmd_name]))
            command.name = cmd_name
            command.params = [each for each in command.params if each.name not in COMPLETION]
        if command is not None:
            command.rich_markup_mode = None  # its tables cut the names of flags
            command.short_help = (command.help or "").partition("\n\n")[0]
        return command

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # typer ends quietly: nobody reads any more
            raise
        except (OdmaError, OSError) as error:
            raise CommandError(f"{ctx.command_path} {ctx.invoked_subcommand}", error) from error

    def main(self, *args: Any, **how: Any) -> NoReturn:
        how["standalone_mode"] = False
        run = super().main
        sys.exit(exit_code_of(lambda: run(*args, **how)))


def lazily(table: Mapping[str, str]) -> type[Commands]:
    """Return a kind of group with the commands of a table."""
    return type("Lazy", (Commands,), {"table": table})


def _app_of(module: str) -> typer.Typer:
    if module.partition(".")[0] == LAB and not _find_lab():
        return _absent
    app: typer.Typer = import_module(module).app
    return app


def _find_lab() -> bool:
    """Make `lab` importable if the package lies in a source tree."""
    from importlib.util import module_from_spec, spec_from_file_location

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
def _explain(_: typer.Context) -> None:
    """Needs a source tree of ODMA."""
    raise OdmaError("it needs a source tree of ODMA, which no package has: run it in a clone")
