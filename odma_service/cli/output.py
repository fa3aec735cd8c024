"""What a command prints: facts as JSON, or as a picture of them for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.segment import Segment

from odma_service.cli.plain import printable

Facts = dict[str, Any]


class SafeConsole(Console):
    """A console for what strangers named: no text of it reaches the terminal as a command."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render with every text printable; rich's own styles and controls stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def by_name(facts: Facts) -> str:
    """Return a line for each fact."""
    width = max(map(len, facts))
    return "\n".join(f"{name:{width}}  {value}" for name, value in facts.items())


def show(
    facts: Facts, as_json: bool, picture: str | Callable[[Facts], RenderableType] = by_name
) -> None:
    """Print facts: as one line of JSON, or as their picture; a text is printed as it is."""
    if as_json:
        typer.echo(json.dumps(facts))
        return
    shown = picture if isinstance(picture, str) else picture(facts)
    typer.echo(printable(shown)) if isinstance(shown, str) else SafeConsole().print(shown)


def object_of(message: Message) -> Facts:
    """Return a message as JSON has it, with the names of the proto and without gaps."""
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def progress_bar(quiet: bool) -> Progress:
    """Return a bar of requests on stderr, which is not drawn where nobody looks."""
    return Progress(
        TextColumn("{task.description:22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=quiet or not sys.stderr.isatty(),
        transient=True,
    )
