"""A terminal of 80 columns, and a pipe: no flag, no name and no figure is cut."""

from __future__ import annotations

import io
import re

import pytest
import typer
from rich.columns import Columns
from rich.console import Group
from rich.table import Table
from running import odma

from odma_service.__main__ import app
from odma_service.cli import top, view
from odma_service.cli.output import SafeConsole
from odma_service.rpc.v1 import pool_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types

CUT = "…"
NARROW = 80


def commands(command, path=()):
    """Yield every command and group, with the words that call it."""
    yield path, command
    if hasattr(command, "list_commands"):
        context = typer.Context(command)
        for name in command.list_commands(context):
            yield from commands(command.get_command(context, name), (*path, name))


ALL = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_the_help_has_every_flag_whole(path):
    command = ALL[path]
    context = typer.Context(command, info_name="odma", terminal_width=NARROW)
    shown = command.get_help(context)
    assert CUT not in shown
    assert max(map(len, shown.splitlines())) <= NARROW
    for parameter in (each for each in command.params if not each.hidden):
        for flag in (*parameter.opts, *parameter.secondary_opts):
            assert flag in shown or not flag.startswith("-")
    for name in getattr(command, "list_commands", lambda _: ())(context):
        summary = command.get_command(context, name).short_help
        assert f" {name} {' '.join(summary.split())}" in " ".join(shown.split())


def test_a_command_prints_that_help():
    shown = odma("serve", "--help", environment={"COLUMNS": str(NARROW)}).stdout
    assert "--decision-log-sketches / --no-decision-log-sketches" in shown


# --- tables ---


def shown(renderable, *, terminal: bool) -> list[str]:
    console = SafeConsole(file=io.StringIO(), width=NARROW, force_terminal=terminal)
    console.print(renderable)
    return re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue()).splitlines()


NAME = "a-name-of-the-longest-kind-that-a-pool-may-have-" + "0123456789abcdef"
SUMMARY = pb.PoolSummary(
    pool=types.PoolRef(name=NAME, epoch=1_795_948_562_152),
    state=pb.POOL_STATE_OPEN,
    capacity_tokens=268_435_456,
    free_tokens=123_456_789,
    regions=65_536,
    policy="elastic",
    idle_seconds=86_399.9,
)
POOL = pb.GetPoolResponse(
    summary=SUMMARY,
    block_tokens=16,
    used_tokens=100_000_000,
    policy=types.Policy(limits_tokens=[10_000_000 + i for i in range(16)]),
    tenants=[pb.TenantReport(name="t" * 32, held_tokens=268_435_456)],
    classes=[pb.ClassReport(request_class="c" * 32, output_quantiles_tokens=[1e7] * 7)],
)
REGION = pb.Region(
    state=pb.REGION_STATE_LIVE,
    place=types.Place(handle=2**52, start_token=268_000_000, length_tokens=435_456),
    request_id="r" * 64,
    request_class="c" * 32,
    max_total_tokens=16_777_216,
)
TABLES = {
    "pools": view.list_of([SUMMARY]),
    "pool": view.picture(POOL, [REGION], NARROW),
    "regions": view.list_of_regions([REGION]),
    "in a group": Group(view.list_of([SUMMARY]), Columns([view.policy(POOL.policy)])),
}


@pytest.mark.parametrize("what", TABLES)
def test_a_narrow_terminal_shows_every_cell(what):
    lines = shown(TABLES[what], terminal=True)
    assert max(map(len, lines)) <= NARROW
    assert CUT not in "".join(lines)


def test_a_wide_table_comes_in_parts_with_their_first_column():
    table = Table("name", *(f"heading-{i}" for i in range(20)), title="title")
    table.add_row("first", *(f"figure-{i}" for i in range(20)))
    text = "\n".join(shown(table, terminal=True))
    for i in range(20):
        assert f" heading-{i} " in text
        assert f" figure-{i} " in text
    assert text.count("first") == text.count(" name ") > 2
    assert text.count("title") == 1


def test_a_pipe_gets_every_name_on_one_line():
    [line] = [line for line in shown(view.list_of([SUMMARY]), terminal=False) if NAME in line]
    assert "86,399.9 s" in line
    assert any("r" * 64 in line for line in shown(view.list_of_regions([REGION]), terminal=False))


# --- odma top ---


def at(moment: float, *pools: pb.GetPoolResponse) -> top.Look:
    return top.Look(moment, [pool.summary for pool in pools], list(pools), [], {})


def pool(name: str, batches: int, *, state: int = pb.POOL_STATE_OPEN) -> pb.GetPoolResponse:
    return pb.GetPoolResponse(
        summary=pb.PoolSummary(
            pool=types.PoolRef(name=name), state=state, capacity_tokens=1000, policy="elastic"
        ),
        counters=pb.Counters(batches=batches),
    )


def test_top_leaves_out_columns_and_cuts_none():
    look = at(1.0, pool("demo-odma-1234", 62_000))
    told = "\n".join(shown(top.picture(look, None, [], "127.0.0.1:50051", NARROW), terminal=True))
    assert CUT not in told
    assert " demo-odma-1234 " in told
    assert "batch/s" in told
    assert "scattered" not in told
    wide = top.picture(look, None, [], "127.0.0.1:50051", 140)
    console = SafeConsole(file=io.StringIO(), width=140)
    console.print(wide)
    assert "scattered" in console.file.getvalue()


def test_top_maps_the_busiest_open_pool():
    before = at(1.0, pool("busy", 10), pool("idle", 900), pool("over", 5))
    closed = pool("over", 5000, state=pb.POOL_STATE_CLOSED)
    pools = [closed, pool("idle", 901), pool("busy", 500)]
    in_order = sorted(pools, key=lambda p: top._importance(p, "", before), reverse=True)
    assert [p.summary.pool.name for p in in_order] == ["busy", "idle", "over"]
    first = max(pools, key=lambda p: top._importance(p, "over", before))
    assert first.summary.pool.name == "over"
