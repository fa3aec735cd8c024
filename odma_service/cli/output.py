"""What a command prints: facts as JSON, or as a picture of them for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import replace
from typing import Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import TextType

from odma_service.cli.plain import printable

Facts = dict[str, Any]
WIDEST = 10_000
"""Columns that a pipe may get."""


class SafeConsole(Console):
    """A console for what strangers named: no text of it reaches the terminal as a command.

    Nothing of a table is cut: a terminal gets one that is too wide in parts, a pipe as it is.
    """

    def print(self, *objects: Any, **how: Any) -> None:
        """Print with whole tables."""
        if not self.is_terminal:
            widest = max((self._width_of(table) for table in _tables_in(objects)), default=0)
            self.width = max(self.width, widest)
        super().print(*map(self._whole, objects), **how)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render with every text printable; rich's own styles and controls stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def _width_of(self, table: Table) -> int:
        options = self.options.update(max_width=WIDEST)
        return Measurement.get(self, options, table).maximum

    def _whole(self, shown: Any) -> Any:
        """Return what is shown with tables in parts that fit, each with their first column."""
        match shown:
            case Group():
                return Group(*map(self._whole, shown.renderables))
            case Columns():
                shown.renderables = list(map(self._whole, shown.renderables))
            case Table():
                return Group(*self._parts(shown))
        return shown

    def _parts(self, table: Table) -> Iterator[Table]:
        """Yield a table, in parts if it is too wide. Cells that are too long are folded."""
        for column in table.columns:
            column.overflow = "fold"
        if self._width_of(table) <= self.width:
            yield table
            return
        first, *others = table.columns
        first.max_width = self.width // 2
        chosen: list[Column] = []
        title = table.title
        for column in others:
            if chosen and self._width_of(_part(table, [first, *chosen, column])) > self.width:
                yield _part(table, [first, *chosen], title=title)
                chosen, title = [], None
            chosen.append(column)
        yield _part(table, [first, *chosen], title=title, caption=table.caption)


def _tables_in(objects: Iterable[Any]) -> Iterator[Table]:
    for shown in objects:
        if isinstance(shown, Table):
            yield shown
        elif isinstance(shown, (Group, Columns)):
            yield from _tables_in(shown.renderables)


def _part(
    table: Table,
    columns: list[Column],
    *,
    title: TextType | None = None,
    caption: TextType | None = None,
) -> Table:
    part = copy(table)
    part.columns = [replace(column, _index=i) for i, column in enumerate(columns)]
    part.title, part.caption = title, caption
    return part


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
