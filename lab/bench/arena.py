"""`odma bench arena`: what a decision costs, beside malloc on the same steps.

Every figure is a median of runs that take turns, so that a busy moment of the machine hits
all of them alike. Ratios are of one run.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lab.bench.building import BenchError, compile_program
from odma_service.cli.options import AsJson
from odma_service.cli.output import show
from odma_service.replay.workplace import workplace

SIZES = {"small": 16_384, "big": 1_048_576}
GROUPS = {"alone": 0, "batches_of_64": 64}
USUAL_SHARE, HIGH_SHARE, FULLEST_SHARE = 0.8, 0.95, 0.99
PLANS = {"planning": HIGH_SHARE, "planning_99": FULLEST_SHARE}  # 20,000 regions fit up to 98 %
REGIONS = 20_000
ATTACHES = 9
WORST = (16_000, 1_024, 5)  # runs that wait, operations, repeats
KEYS = (64, 48, 400)  # regions where keys may be found, keys of each of 8 allocates, repeats
GOALS = {
    "ratio_small_batches": 2.2,
    "ratio_big_batches": 1.1,
    "refused_share": 0.019,
    "refused_share_compacting": 0.0,
    "attach_ms": 20.0,
}

Figures = dict[str, Any]


SOURCE = Path(__file__).with_name("arena.c")

app = typer.Typer()


@app.command()
def command(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of which the median counts.")] = 7,
    steps: Annotated[
        int, typer.Option(min=1_000, max=10_000_000, help="Timed operations of a run.")
    ] = 400_000,
    as_json: AsJson = False,
) -> None:
    """Time reserve and free beside malloc, planning, its worst case, and attaching.

    Goals are shown, not enforced: how far they hold depends on the machine.
    """
    with workplace() as directory:
        figures = measure(directory, steps, repeats, quiet=as_json)
    show(figures, as_json, _table)


def measure(directory: Path, steps: int, repeats: int, *, quiet: bool) -> Figures:
    """Return all figures, by size."""
    program = compile_program(SOURCE, directory)
    runs: dict[str, list[Figures]] = {}
    with Progress(disable=quiet, console=Console(stderr=True)) as progress:
        plan = [
            (name, command, seed)
            for seed in range(1, repeats + 1)
            for name, command in _commands(directory / "arena.pool", steps).items()
        ]
        for name, command, seed in progress.track(plan, description="bench arena"):
            runs.setdefault(name, []).append(_run(program, *command, seed))
        attached = _run(program, "attach", directory / "arena.pool", REGIONS, ATTACHES)
    worst = _run(program, "worst", directory / "arena.pool", *WORST)
    keys = _run(program, "keys", directory / "arena.pool", *KEYS)
    return {
        "directory": str(directory.parent),
        "steps": steps,
        "repeats": repeats,
        **{size: _of_size(size, runs) for size in SIZES},
        "attach": {"regions": attached["regions"], "ms": attached["median_ms"]},
        "worst": worst,
        "keys": keys,
        "goals": GOALS,
    }


def _commands(path: Path, steps: int) -> dict[str, list[object]]:
    """Return the arguments of each kind of run, but for the seed."""
    commands: dict[str, list[object]] = {}
    for size, blocks in SIZES.items():
        for group, batch in GROUPS.items():
            commands[f"{size} {group}"] = ["mix", path, blocks, USUAL_SHARE, batch, 0, steps]
        for name, compact in (("full", 0), ("full compacting", 1)):
            commands[f"{size} {name}"] = ["mix", path, blocks, HIGH_SHARE, 64, compact, steps]
        for name, share in PLANS.items():
            commands[f"{size} {name}"] = ["plans", path, blocks, share, steps // 4]
    return commands


def _run(program: Path, *arguments: object) -> Figures:
    command = [str(program), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise BenchError(f"{' '.join(command[1:])}: {run.stderr.strip()}")
    figures: Figures = json.loads(run.stdout)
    return figures


def _of_size(size: str, runs: dict[str, list[Figures]]) -> Figures:
    return {
        "blocks": SIZES[size],
        "live": _median(runs[f"{size} alone"], "live"),
        **{group: _beside_malloc(runs[f"{size} {group}"]) for group in GROUPS},
        "full_95": {
            "refused_share": _refused_share(runs[f"{size} full"]),
            "refused_share_compacting": _refused_share(runs[f"{size} full compacting"]),
        },
        **{name: _planning(runs[f"{size} {name}"]) for name in PLANS},
    }


def _planning(runs: list[Figures]) -> Figures:
    compacting = [run for run in runs if run["compacting"]]
    return {
        "batches": sum(run["compacting"] for run in runs),
        "p50_us": _median(compacting, "compacting_p50_us"),
        "p99_us": _median(compacting, "compacting_p99_us"),
        "without_p50_us": _median(runs, "plain_p50_us"),
        "without_p99_us": _median(runs, "plain_p99_us"),
    }


def _beside_malloc(runs: list[Figures]) -> Figures:
    return {
        "arena_ns": _median(runs, "arena_ns"),
        "malloc_ns": _median(runs, "malloc_ns"),
        "ratio": round(median(run["arena_ns"] / run["malloc_ns"] for run in runs), 3),
    }


def _refused_share(runs: list[Figures]) -> float:
    return float(sum(run["refused"] for run in runs) / sum(run["reserves"] for run in runs))


def _median(runs: list[Figures], name: str) -> float | None:
    """Return the median of one figure, None where nothing was measured."""
    return round(float(median(run[name] for run in runs)), 3) if runs else None


def _table(figures: Figures) -> Table:
    table = Table("what", *SIZES, "goal")
    for name, group, figure, goal in (
        ("live regions at 80 % full", None, "live", ""),
        ("alone, ns an operation", "alone", "arena_ns", ""),
        ("  ratio to malloc", "alone", "ratio", ""),
        ("in batches of 64, ns", "batches_of_64", "arena_ns", ""),
        ("  ratio to malloc", "batches_of_64", "ratio", "2.2, 1.1"),
        ("  malloc, ns", "batches_of_64", "malloc_ns", ""),
        ("refused at 95 % full", "full_95", "refused_share", "0.019"),
        ("  with compaction", "full_95", "refused_share_compacting", "0"),
        ("a batch that compacts, p50 us", "planning", "p50_us", ""),
        ("  p99 us", "planning", "p99_us", ""),
        ("  one that does not, p50 us", "planning", "without_p50_us", ""),
        ("one that compacts at 99 % full, p50 us", "planning_99", "p50_us", ""),
        ("  p99 us", "planning_99", "p99_us", ""),
    ):
        values = (figures[size] if group is None else figures[size][group] for size in SIZES)
        table.add_row(name, *(_shown(value[figure]) for value in values), goal)
    attach = figures["attach"]
    table.add_row(f"attach, {attach['regions']:,} regions, ms", "", _shown(attach["ms"]), "20")
    worst = figures["worst"]
    name = f"worst batch: {worst['operations']:,} plans, {worst['waiting']:,} runs wait, ms"
    table.add_row(name, "", _shown(worst["median_ms"]), "")
    keys = figures["keys"]
    for name, figure in (("found", "found_ns_a_key"), ("not found", "missed_ns_a_key")):
        row = f"8 allocates with {keys['keys']} keys each, ns a key {name}"
        table.add_row(row, "", _shown(keys[figure]), "")
    return table


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"
