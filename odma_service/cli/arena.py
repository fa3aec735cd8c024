"""`odma arena`: look into a pool's file, without the service and without changing it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console, Group, RenderableType

from odma_service._native import CLASS_OTHER, CLASS_POOL, Arena
from odma_service.cli import view
from odma_service.cli.failures import BadResultError, bad_result
from odma_service.cli.lazy import Commands
from odma_service.cli.options import AsJson
from odma_service.cli.output import Facts, show
from odma_service.errors import BooksCorruptError, BooksMismatchError
from odma_service.pool import PoolSpec
from odma_service.pool.books import IN_USE, Copy, copied
from odma_service.rpc.v1 import pool_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.service.rpc.reports import policy_to, region_to

app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Check a pool's file, or show what is in it."
)

FILES = "NAME.pool of a pool directory, or a file that was set aside."
File = Annotated[Path, typer.Argument(help=FILES)]


@app.command()
def check(files: Annotated[list[Path], typer.Argument(help=FILES)]) -> None:
    """Say whether books keep every rule. Exit code 1: some break one."""
    broken = []
    for file in files:
        try:
            _check(file, f"{file}: " if len(files) > 1 else "")
        except BooksCorruptError as error:
            broken.append(str(error))
    if broken:
        raise BadResultError(*broken)


def _check(file: Path, whose: str) -> None:
    with copied(file) as copy:
        copy.arena.check()
        report = copy.arena.report()
        life = f"epoch {report.epoch}" if report.epoch else f"closed, epoch {report.last_epoch}"
        told = f"{whose}ok: {report.live:,} regions, {life}, seq {report.seq}"
        typer.echo(told + IN_USE * copy.in_use)
        if report.recovery:
            word = report.recovery.name.lower()
            typer.echo(f"half done: a commit was cut short; the next attach has it {word}")


@app.command()
def dump(file: File, as_json: AsJson = False) -> None:
    """Show what is in the books, as a picture or as JSON."""
    with bad_result(BooksCorruptError), copied(file) as copy:
        show(_as_object(file, copy), as_json, lambda _: _picture(file, copy.arena))


def _picture(file: Path, arena: Arena) -> RenderableType:
    regions = [region_to(entry) for entry in _entries(arena)]
    pool = view.picture(_as_message(file, arena), regions, Console().width)
    return Group(pool, view.list_of_regions(regions))


def _entries(arena: Arena) -> list[Any]:
    return list(arena.regions(0, arena.geometry.most_entries))


def _as_object(file: Path, copy: Copy) -> Facts:
    arena = copy.arena
    report = arena.report()
    counters = report.counters._asdict()
    return {
        "file": str(file),
        "in_use": copy.in_use,
        "geometry": arena.geometry._asdict(),
        "description": arena.description().decode(errors="replace"),
        **report._asdict(),
        "recovery": report.recovery.name,
        "counters": counters,
        "engine": arena.engine._asdict() if report.epoch else None,
        "policy": asdict(arena.policy()),
        "regions": [entry._asdict() for entry in _entries(arena)],
        "classes": _classes(arena),
    }


def _classes(arena: Arena) -> list[dict[str, Any]]:
    """Return the learnt lengths: of all requests together, then of each class."""
    named = [(CLASS_POOL, "(pool)"), *enumerate(arena.class_names()), (CLASS_OTHER, "(other)")]
    classes = []
    for index, name in named:
        histogram, known = arena.histogram(index), arena.quantiles(index)
        if histogram.completions or index < CLASS_POOL:
            classes.append(
                {
                    "name": name,
                    "completions": histogram.completions,
                    "finished": float(histogram.output_finished.sum()),
                    "hit_limit": float(histogram.output_censored.sum()),
                    "output_quantiles_tokens": known and list(known[0]),
                }
            )
    return classes


def _as_message(file: Path, arena: Arena) -> pb.GetPoolResponse:
    """Return a pool as the service would report it, as far as a file tells."""
    report, geometry = arena.report(), arena.geometry
    engine, spec = arena.engine if report.epoch else None, _spec(arena)
    if engine is None and spec is not None:
        engine = spec.engine()
    return pb.GetPoolResponse(
        summary=pb.PoolSummary(
            pool=types.PoolRef(name=file.name, epoch=report.last_epoch),
            state=pb.POOL_STATE_OPEN if report.epoch else pb.POOL_STATE_CLOSED,
            capacity_tokens=geometry.blocks * geometry.block_tokens,
            free_tokens=report.free_tokens,
            regions=report.live,
        ),
        block_tokens=geometry.block_tokens,
        bytes_per_token=spec.geometry.bytes_per_token if spec else 0,
        moves=cast("types.Moves.ValueType", int(engine.moves) if engine else 0),
        single_ordered_stream=bool(engine and engine.single_ordered_stream),
        copies_may_overlap=bool(engine and engine.copies_may_overlap),
        last_seq=report.seq,
        policy=policy_to(arena.policy()),
        reserved_tokens=report.reserved_tokens,
        used_tokens=report.used_tokens,
        awaiting_completion_tokens=report.awaiting_completion_tokens,
        largest_run_tokens=report.largest_run_tokens,
        free_runs=report.free_runs,
        safety_tokens=report.safety_tokens,
        counters=pb.Counters(**report.counters._asdict()),
        classes=[
            pb.ClassReport(
                request_class=entry["name"],
                finished=entry["finished"],
                hit_limit=entry["hit_limit"],
                output_quantiles_tokens=entry["output_quantiles_tokens"] or (),
            )
            for entry in _classes(arena)
        ],
    )


def _spec(arena: Arena) -> PoolSpec | None:
    """Return the service's own note of the last owner, which an engine's own file need not have."""
    try:
        return PoolSpec.from_json(arena.description())
    except BooksMismatchError:
        return None
