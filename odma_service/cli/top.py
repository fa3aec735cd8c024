"""`odma top`: pools, a map of one of them, rates and events, drawn anew every second.

All but the time of an Apply comes from PoolService; that time is from the metrics, if they can be
reached. Rates are differences between two looks.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import threading
import time
import tty
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NamedTuple

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from odma_service.cli import view
from odma_service.cli.options import Connection, connecting
from odma_service.cli.output import SafeConsole
from odma_service.client import Client
from odma_service.errors import OdmaError, PoolNotFoundError, UnavailableError
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb

EVENTS_SHOWN = 8
POOLS_SHOWN = 12
POOLS_LOOKED_AT = 32
BAR_CELLS = 10
APPLY = "odma.v1.MemoryService.Apply"
RATES = (
    ("batch/s", ("batches",)),
    ("grant/s", ("allocates",)),
    ("copy/s", ("copied_tokens",)),
    ("refuse/s", ("refused_allocates", "refused_extends")),
    ("preempt/s", ("preempted",)),
)
LEFT = ("pool", "state", "policy", "memory")
LEAST_FIRST = (
    "scattered",
    "policy",
    "reused",
    "preempt/s",
    "copy/s",
    "refuse/s",
    "reserved",
    "grant/s",
)
"""Columns in the order in which a narrow terminal does without them. Scattered: the share of the
memory that is free, but outside of the longest run."""


class Look(NamedTuple):
    """One look at a service. apply_seconds: cumulative counts by upper bound."""

    at: float
    summaries: list[pool_pb.PoolSummary]
    pools: list[pool_pb.GetPoolResponse]
    regions: list[pool_pb.Region]
    apply_seconds: dict[float, float]

    def pool_of(self, name: str) -> pool_pb.GetPoolResponse | None:
        """Return a pool as it was at this look."""
        return next((pool for pool in self.pools if pool.summary.pool.name == name), None)


app = typer.Typer()


@app.command()
@connecting
def command(
    connection: Connection,
    pool: Annotated[
        str, typer.Argument(help="The pool to map. Without it: the open one with most batches.")
    ] = "",
    metrics: Annotated[
        str, typer.Option(help="The metrics, host:port, for the time of an Apply. Empty: none.")
    ] = "127.0.0.1:9464",
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Show pools and their events, live. q or Ctrl-C ends it."""
    console = SafeConsole()
    if not (sys.stdin.isatty() and console.is_terminal):
        raise OdmaError("it needs a terminal; see odma status and odma watch")
    events: deque[str] = deque(maxlen=EVENTS_SHOWN)
    with connection.client() as service, _keys() as keys:
        threading.Thread(target=_read_events, args=(service, events), daemon=True).start()
        before: Look | None = None
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                try:
                    now = look(service, pool, metrics, before)
                    shown = picture(now, before, list(events), connection.target, console.width)
                    before = now
                except UnavailableError as error:
                    shown = Text(f"no answer from {connection.target}: {error}", style="red")
                    before = None
                live.update(shown, refresh=True)
                if _quit_pressed(keys, every):
                    return


def look(service: Client, mapped: str, metrics: str, before: Look | None) -> Look:
    """Look once at the pools that may be shown, and at the regions of the first, to be mapped.

    Those are the ones with most regions: a look at hundreds of pools takes longer than a second.
    """
    pools = []
    summaries = sorted(
        service.list_pools().pools,
        key=lambda summary: (summary.pool.name == mapped, _is_open(summary), summary.regions),
        reverse=True,
    )
    for summary in summaries[:POOLS_LOOKED_AT]:
        try:
            pools.append(service.get_pool(summary.pool.name))
        except PoolNotFoundError:
            continue  # gone since
    pools.sort(key=lambda pool: _importance(pool, mapped, before), reverse=True)
    try:
        regions = service.list_regions(pools[0].summary.pool.name) if pools else []
    except PoolNotFoundError:
        regions = []
    return Look(time.monotonic(), summaries, pools, regions, _apply_seconds(metrics))


def _importance(
    pool: pool_pb.GetPoolResponse, mapped: str, before: Look | None
) -> tuple[bool, bool, int, int]:
    """Return what pools are sorted by: asked for, open, batches since the look before, regions."""
    name = pool.summary.pool.name
    then = before.pool_of(name) if before else None
    batches = pool.counters.batches - then.counters.batches if then else 0
    return name == mapped, _is_open(pool.summary), batches, pool.summary.regions


def _is_open(summary: pool_pb.PoolSummary) -> bool:
    return summary.state != pool_pb.POOL_STATE_CLOSED


def picture(
    now: Look, before: Look | None, events: list[str], target: str, width: int
) -> RenderableType:
    """Return the picture of a look, with rates since the one before."""
    headline = Text.assemble(
        ("odma top", "bold"),
        f"   {target}   pools {len(now.summaries)}   "
        f"regions {sum(summary.regions for summary in now.summaries):,}   "
        f"Apply p99 {_p99(now, before)}   ",
        ("q quits", "dim"),
    )
    parts: list[RenderableType] = [headline, _pools(now, before, width)]
    if now.pools:
        first = now.pools[0]
        title = f"{first.summary.pool.name}: {first.free_runs} free runs"
        cells = max(width - view.MARGIN - 4, 10)
        parts.append(Panel(view.bar(first, now.regions, cells), title=title, title_align="left"))
    told = Text("\n".join(events) or "nothing yet", overflow="ellipsis", no_wrap=True)
    parts.append(Panel(told, title="events", title_align="left"))
    return Group(*parts)


def _pools(now: Look, before: Look | None, width: int) -> Table:
    """Return the table of pools, without the columns that are worth least where it is narrow."""
    seconds = now.at - before.at if before else 0.0
    shown = [_row(pool, before, seconds) for pool in now.pools[:POOLS_SHOWN]]
    names = list(shown[0]) if shown else ["pool"]
    for least in LEAST_FIRST:
        widths = (max(len(name), *(len(row[name]) for row in shown)) + 1 for name in names)
        if not shown or sum(widths) <= width:
            break
        names.remove(least)
    table = Table(expand=True, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        left = name in LEFT
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for row in shown:
        table.add_row(*(row[name] for name in names))
    if len(now.summaries) > len(shown):
        table.add_row(f"and {len(now.summaries) - len(shown)} more")
    return table


def _row(pool: pool_pb.GetPoolResponse, before: Look | None, seconds: float) -> dict[str, Text]:
    """Return the cells of a pool by their columns."""
    summary = pool.summary
    capacity = summary.capacity_tokens
    written, reserved = pool.used_tokens / capacity, pool.reserved_tokens / capacity
    then = before.pool_of(summary.pool.name) if before else None
    scattered = (summary.free_tokens - pool.largest_run_tokens) / capacity
    cells: dict[str, str | Text] = {
        "pool": summary.pool.name,
        "state": view.state(summary),
        "policy": summary.policy,
        "memory": _filled(written, reserved),
        "written": f"{written:.0%}",
        "reserved": f"{reserved:.0%}",
        "scattered": f"{scattered:.0%}",
        "reused": _reused(pool, then),
        **{name: _rate(pool, then, seconds, fields) for name, fields in RATES},
    }
    return {name: cell if isinstance(cell, Text) else Text(cell) for name, cell in cells.items()}


def _filled(written: float, reserved: float) -> Text:
    full, half = round(written * BAR_CELLS), round(reserved * BAR_CELLS)
    bar = Text("▇" * full, "green").append("▒" * (half - full), "yellow")
    return bar.append("·" * (BAR_CELLS - max(full, half)), "dim")


def _rate(
    now: pool_pb.GetPoolResponse,
    then: pool_pb.GetPoolResponse | None,
    seconds: float,
    fields: tuple[str, ...],
) -> str:
    if then is None:
        return "-"
    done = sum(getattr(now.counters, field) - getattr(then.counters, field) for field in fields)
    return f"{max(done, 0) / seconds:,.0f}"  # the books of a pool that was made anew begin at 0


def _reused(now: pool_pb.GetPoolResponse, then: pool_pb.GetPoolResponse | None) -> str:
    """Return the share of the prompts since the look before that needed no prefill."""
    if then is None:
        return "-"
    prompts = now.reuse.prompt_tokens - then.reuse.prompt_tokens
    reused = now.reuse.reused_tokens - then.reuse.reused_tokens
    return f"{max(reused, 0) / prompts:.0%}" if prompts > 0 else "-"


def _apply_seconds(metrics: str) -> dict[float, float]:
    """Return the number of Apply by upper bound of their time; nothing without metrics."""
    if not metrics:
        return {}
    try:
        with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=1) as page:
            families = list(text_string_to_metric_families(page.read().decode()))
    except (OSError, ValueError):
        return {}
    return {
        float(sample.labels["le"]): sample.value
        for family in families
        for sample in family.samples
        if sample.name == "odma_rpc_duration_seconds_bucket" and sample.labels["rpc"] == APPLY
    }


def _p99(now: Look, before: Look | None) -> str:
    """Return the bound that 99 of 100 Apply kept since the look before."""
    earlier = before.apply_seconds if before else {}
    counts = {le: count - earlier.get(le, 0) for le, count in now.apply_seconds.items()}
    most = max(counts.values(), default=0)
    if not most:
        return "-"
    bound = min(le for le, count in counts.items() if count >= 0.99 * most)
    return f"<= {bound * 1000:g} ms"


def _read_events(service: Client, events: deque[str]) -> None:
    """Keep the last events, for as long as there is somebody to show them to."""
    while True:
        try:
            for answer in service.watch():
                if answer.lost:
                    events.append(view.LOST)
                if answer.HasField("event"):
                    events.append(view.line_of(answer.event))
        except UnavailableError:
            time.sleep(1)
        except (OdmaError, ValueError):  # it may not watch, or the view has ended
            return


@contextmanager
def _keys() -> Iterator[int]:
    """Read keys as they are pressed, without showing them."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _quit_pressed(keys: int, seconds: float) -> bool:
    """Wait so long, or for a key; return whether it was q or the end of the input."""
    readable, _, _ = select.select([keys], [], [], seconds)
    return bool(readable) and os.read(keys, 1) in {b"q", b"Q", b""}
