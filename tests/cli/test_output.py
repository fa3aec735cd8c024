"""What strangers named cannot steer the terminal that shows it."""

from __future__ import annotations

import io

from rich.table import Table
from rich.text import Text

from odma_service.cli import view
from odma_service.cli.output import SafeConsole
from odma_service.cli.plain import printable
from odma_service.rpc.v1 import pool_service_pb2 as pb

HOSTILE = "\x1b]0;owned\x07\x1b[2Jid\x9b31m\u202e\r"


def shown(renderable) -> str:
    console = SafeConsole(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def test_a_region_with_a_hostile_name_is_shown_and_harmless():
    region = pb.Region(request_id=HOSTILE, request_class=HOSTILE)
    text = shown(view.list_of_regions([region]))
    assert "id" in text
    assert all(c.isprintable() or c == "\n" for c in text)


def test_titles_and_cells_are_harmless_too():
    table = Table(HOSTILE, title=Text(HOSTILE))
    table.add_row(Text(HOSTILE))
    assert all(c.isprintable() or c == "\n" for c in shown(table))


def test_styles_stay():
    console = SafeConsole(file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(Text("bold", style="bold"))
    assert "\x1b[1mbold" in console.file.getvalue()


def test_lines_stay_lines():
    assert printable("one\ntwo\x1b[2J") == "one\ntwo [2J"
