"""Pools, regions and events as people see them in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from odma_service.cli.plain import printable
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1 import types_pb2 as types

BAR_ROWS = 4
MARGIN = 10
LOST = "events were lost"
LOOKS = {
    "used": ("█", "green"),
    "reserved, unused": ("▒", "yellow"),
    "waiting": ("░", "magenta"),
    "kept": ("▪", "cyan"),
    "free": ("·", "dim"),
}
"""Kinds of tokens. Where a cell of the bar holds several kinds, the most frequent shows."""


def list_of(pools: Iterable[pool_pb.PoolSummary]) -> RenderableType:
    """Return a table with one line for each pool."""
    table = Table("pool", "state", "policy", title="pools", title_justify="left")
    for name in ("capacity", "free", "regions", "idle"):
        table.add_column(name, justify="right")
    for pool in pools:
        table.add_row(
            pool.pool.name,
            state(pool),
            pool.policy,
            f"{pool.capacity_tokens:,}",
            f"{pool.free_tokens:,}",
            f"{pool.regions:,}",
            f"{pool.idle_seconds:,.1f} s",
        )
    return table


def picture(
    pool: pool_pb.GetPoolResponse, regions: list[pool_pb.Region], width: int
) -> RenderableType:
    """Return one pool as a bar over its addresses and tables below it."""
    tables = [_memory(pool), policy(pool.policy), _counters(pool)]
    if pool.granule_tokens:
        tables.append(_reuse(pool.reuse))
    if pool.buckets:
        tables.append(_buckets(pool))
    if pool.tenants:
        tables.append(_tenants(pool))
    if pool.classes:
        tables.append(_classes(pool))
    return Group(
        _headline(pool),
        Text(),
        bar(pool, regions, max(width - MARGIN, 10)),
        Text(),
        Columns(tables, padding=(1, 3)),
    )


def list_of_regions(regions: Iterable[pool_pb.Region]) -> RenderableType:
    """Return a table of the books."""
    table = Table("request", "class", title="regions", title_justify="left")
    for name in ("handle", "start", "length", "used", "reusable", "maximum", "awaits"):
        table.add_column(name, justify="right")
    for region in regions:
        live = region.state == pool_pb.REGION_STATE_LIVE
        table.add_row(
            Text(region.request_id),
            Text(region.request_class),
            str(region.place.handle) if live else "",
            f"{region.place.start_token:,}",
            f"{region.place.length_tokens:,}",
            f"{region.used_tokens:,}" if live else "",
            f"{region.shareable_tokens:,}",
            f"{region.max_total_tokens:,}" if live else "",
            f"seq {region.awaits_seq}" if region.awaits_seq else "",
        )
    return table


def state(pool: pool_pb.PoolSummary) -> str:
    """Return the pool's state in lower case."""
    return pool_pb.PoolState.Name(pool.state).removeprefix("POOL_STATE_").lower()


def kind_of(event: pool_pb.Event) -> str:
    """Return the kind of an event in lower case, also one that this version does not know."""
    known = {number: name for name, number in pool_pb.EventKind.items()}
    return known.get(event.kind, f"kind_{event.kind}").removeprefix("EVENT_KIND_").lower()


def line_of(event: pool_pb.Event) -> str:
    """Return an event as one printable line, in UTC."""
    at = datetime.fromtimestamp(event.unix_seconds, UTC)
    line = f"{at:%H:%M:%S}  {event.pool.name:<16} {kind_of(event):<13} {event.reason}".rstrip()
    return printable(line).replace("\n", " ")


def _headline(pool: pool_pb.GetPoolResponse) -> Text:
    summary = pool.summary
    moves = types.Moves.Name(pool.moves).removeprefix("MOVES_").lower()
    size = summary.capacity_tokens * pool.bytes_per_token / 1e9
    return Text.assemble(
        (summary.pool.name, "bold"),
        f"  {state(summary)}, epoch {summary.pool.epoch}, batch {pool.last_seq}, "
        f"idle {summary.idle_seconds:,.1f} s\n"
        f"{summary.capacity_tokens:,} tokens in blocks of {pool.block_tokens}, "
        f"{pool.bytes_per_token:,} bytes a token: {size:,.1f} GB a rank\n"
        f"moves {moves}, "
        f"{'one ordered stream' if pool.single_ordered_stream else 'several streams'}, "
        f"copies {'may' if pool.copies_may_overlap else 'may not'} overlap"
        + (f", reuse in granules of {pool.granule_tokens}" if pool.granule_tokens else ""),
    )


def bar(pool: pool_pb.GetPoolResponse, regions: list[pool_pb.Region], width: int) -> Text:
    """Return the pool's addresses as rows of `width` cells, with a legend below."""
    capacity = pool.summary.capacity_tokens
    kinds = cells(capacity, regions, BAR_ROWS * width)
    bar = Text()
    for row in range(BAR_ROWS):
        bar.append(f"{capacity * row // BAR_ROWS:>{MARGIN - 2},}  ", "dim")
        for kind in kinds[row * width : (row + 1) * width]:
            bar.append(*LOOKS[kind])
        bar.append("\n")
    bar.append(" " * MARGIN)
    for kind, (glyph, style) in LOOKS.items():
        bar.append(glyph, style).append(f" {kind}   ")
    return bar


def cells(capacity: int, regions: Iterable[pool_pb.Region], count: int) -> list[str]:
    """Divide [0, capacity) evenly and return the kind that most tokens of each part have."""
    size = capacity / count
    shares = [dict.fromkeys(LOOKS, 0.0) | {"free": size} for _ in range(count)]
    for start, end, kind in _runs(regions):
        for i in range(int(start / size), min(int(end / size) + 1, count)):
            overlap = max(min(end, (i + 1) * size) - max(start, i * size), 0.0)
            shares[i][kind] += overlap
            shares[i]["free"] -= overlap
    return [max(share, key=lambda kind: share[kind]) for share in shares]


def _runs(regions: Iterable[pool_pb.Region]) -> Iterator[tuple[int, int, str]]:
    for region in regions:
        start = region.place.start_token
        end = start + region.place.length_tokens
        if region.state == pool_pb.REGION_STATE_LIVE:
            yield start, start + region.used_tokens, "used"
            yield start + region.used_tokens, end, "reserved, unused"
        else:
            kept = region.state == pool_pb.REGION_STATE_KEPT
            yield start, end, "kept" if kept else "waiting"


def _memory(pool: pool_pb.GetPoolResponse) -> Table:
    free = pool.summary.free_tokens
    open_to_admission = max(free - pool.safety_tokens, 0)
    table = _facts_table("memory", "tokens", "share")
    for name, tokens in (
        ("used", pool.used_tokens),
        ("reserved, unused", pool.reserved_tokens - pool.used_tokens),
        ("waiting", pool.awaiting_completion_tokens),
        ("free", free),
        ("  open to admission", open_to_admission),
        ("  largest run", pool.largest_run_tokens),
        ("  in other runs", free - pool.largest_run_tokens),
        ("  kept", pool.reuse.kept_tokens),
        ("safety pool", pool.safety_tokens),
    ):
        share = tokens / pool.summary.capacity_tokens
        table.add_row(Text(name), f"{tokens:,}", f"{share:.1%}")
    table.add_row("free runs", f"{pool.free_runs:,}", "")
    return table


def policy(policy: types.Policy) -> Table:
    """Return a table of a policy record."""
    table = _facts_table("policy", f"{policy.name}, version {policy.version}")
    table.add_row("start", types.Start.Name(policy.start).removeprefix("START_").lower())
    overflow = types.Overflow.Name(policy.overflow).removeprefix("OVERFLOW_").lower()
    table.add_row("overflow", overflow)
    limits = " ".join(map(str, policy.limits_tokens)) or "none"
    table.add_row("bucket limits", limits)
    for name in ("step_tokens", "max_copy_tokens"):
        table.add_row(name, f"{getattr(policy, name):,}")
    for name in ("overflow_risk", "safety_share", "unsure_ratio", "growth", "tenant_share"):
        table.add_row(name, f"{getattr(policy, name):g}")
    for tenant in policy.tenants:
        share = f"{tenant.guaranteed_share:g} to {tenant.maximum_share:g}"
        table.add_row(Text(f"tenant {tenant.name}"), share)
    return table


def _counters(pool: pool_pb.GetPoolResponse) -> Table:
    table = _facts_table("since it was made", "")
    for field in pool_pb.Counters.DESCRIPTOR.fields:
        count = getattr(pool.counters, field.name)
        table.add_row(field.name.replace("_", " "), f"{count:,}")
    return table


def _reuse(reuse: pool_pb.ReuseReport) -> Table:
    table = _facts_table("reuse since it was made", "tokens", "of prompts")
    for how in ("prompt", "reused", "adopted", "gathered", "shared", "given_up"):
        tokens = getattr(reuse, f"{how}_tokens")
        table.add_row(
            how.replace("_", " "), f"{tokens:,}", f"{tokens / max(reuse.prompt_tokens, 1):.1%}"
        )
    return table


def _buckets(pool: pool_pb.GetPoolResponse) -> Table:
    table = _facts_table("buckets", "live regions")
    for bucket in pool.buckets:
        table.add_row(f"to {bucket.limit_tokens:,} tokens", f"{bucket.regions:,}")
    return table


def _tenants(pool: pool_pb.GetPoolResponse) -> Table:
    names = ("regions", "held", "guaranteed", "maximum", "borrowed", "claimed")
    table = _facts_table("tenants", *names)
    for tenant in pool.tenants:
        tokens = [getattr(tenant, f"{name}_tokens") for name in names[1:]]
        table.add_row(Text(tenant.name), *(f"{n:,}" for n in (tenant.regions, *tokens)))
    return table


def _classes(pool: pool_pb.GetPoolResponse) -> Table:
    table = _facts_table("request classes", "finished", "at limit", "q50", "q90", "q99")
    for known in pool.classes:
        quantiles = list(known.output_quantiles_tokens)
        shown = [f"{quantiles[i]:,.0f}" for i in (2, 4, 6)] if quantiles else ["-"] * 3
        name = known.request_class or "(none)"
        table.add_row(Text(name), f"{known.finished:,.0f}", f"{known.hit_limit:,.0f}", *shown)
    return table


def _facts_table(first: str, *others: str) -> Table:
    table = Table(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
