"""`odma bench torture`: processes are killed at random moments and must forget nothing.

One kill in ten hits a real server under load, every other of these at a store into a pool's file.
The others hit a process that does little else than commit, so that many hit a commit that is half
done. A kill counts as in a batch if the next attach found something to drop or to do again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from lab.bench.building import compile_program
from lab.robustness import killed_arena, killed_service
from lab.robustness.twin import Findings
from odma_service.cli.failures import BadResultError
from odma_service.cli.options import AsJson
from odma_service.cli.output import show
from odma_service.replay.workplace import workplace

ENOUGH_KILLS = 100  # for the share in a batch to mean something
LEAST_IN_BATCH = 0.2
KINDS = ("lost", "doubled", "leaked", "wrong_replays")


SOURCE = Path(__file__).with_name("torture.c")

app = typer.Typer()


@app.command()
def command(
    kills: Annotated[int, typer.Option(min=1, max=1_000_000, help="Processes to kill.")] = 1_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the loads and of the moments.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Kill processes at work, and compare their books with the answers they gave.

    Exit code 1: something was lost, doubled, leaked or answered differently the second time,
    or fewer than a fifth of 100 or more kills hit a batch. Stops at the first such thing.
    """
    with workplace() as directory, _progress(quiet=as_json) as progress:
        task = progress.add_task("kills", total=kills)
        outcome, findings = torture(directory, kills, seed, lambda: progress.advance(task))
    show(outcome, as_json)
    if findings.words:
        raise BadResultError(*findings.words)
    if kills >= ENOUGH_KILLS and outcome["in_batch"] < LEAST_IN_BATCH * outcome["kills"]:
        raise BadResultError(f"fewer than {LEAST_IN_BATCH:.0%} of the kills hit a batch")


def torture(
    directory: Path, kills: int, seed: int, watch: Callable[[], None]
) -> tuple[dict[str, Any], Findings]:
    """Share the kills among the parts, and return what came of them all."""
    begun = time.monotonic()
    findings = Findings()
    served = -(-kills // 10)
    server = killed_service.torture(directory, served, seed, findings, watch)
    program = compile_program(SOURCE, directory)
    arenas = []
    for i, engine in enumerate(killed_arena.ENGINES):
        share = (kills - served + i) // len(killed_arena.ENGINES)
        subject = killed_arena.Subject(program, directory / f"{i}.pool", engine, seed, findings)
        arenas.append(subject.torture(share, watch))
    return {
        "kills": server.kills + sum(part.kills for part in arenas),
        "in_batch": server.in_batch + sum(part.in_batch for part in arenas),
        **{kind: getattr(findings, kind) for kind in KINDS},
        "acknowledged": server.acknowledged + sum(part.acknowledged for part in arenas),
        "reused_tokens": server.reused_tokens + sum(part.reused_tokens for part in arenas),
        "service": server.figures(),
        "arena": {
            "kills": sum(part.kills for part in arenas),
            "in_batch": sum(part.in_batch for part in arenas),
            "in_batch_with_reuse": sum(part.in_batch for part in arenas if part.found_tokens),
            "reused_tokens": sum(part.reused_tokens for part in arenas),
            "found_tokens": sum(part.found_tokens for part in arenas),
            "copying_share": round(sum(part.copying for part in arenas) / len(arenas), 3),
        },
        "seed": seed,
        "seconds": round(time.monotonic() - begun, 1),
    }, findings


def _progress(*, quiet: bool) -> Progress:
    return Progress(disable=quiet, console=Console(stderr=True))
