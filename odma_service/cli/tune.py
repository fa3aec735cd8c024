"""`odma tune`: every policy's free parameters, set by one rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from odma_service import replay
from odma_service.cli.replay import policies_of
from odma_service.errors import InvalidError
from odma_service.replay.workplace import workplace

PACKAGE = Path(replay.__file__).resolve().parents[1]
app = typer.Typer()


@app.command()
def command(
    out: Annotated[
        Path, typer.Option(help="The file to write; what it has of other policies stays.")
    ],
    data: Annotated[
        Path, typer.Option(help="Folder with the public traces (traces/, servegen/).")
    ] = Path("../shared/data"),
    policy: Annotated[
        str,
        typer.Option(help="Policies to tune, divided by commas. Default: all.", show_default=False),
    ] = ",".join(replay.NAMES),
    capacity_tokens: Annotated[
        int, typer.Option(min=1_024, max=2**26, help="Size of the pool.")
    ] = 111_000,
) -> None:
    """Set every policy's free parameters by one rule, on training traces only."""
    names = policies_of(policy)
    if out.resolve().is_relative_to(PACKAGE):
        raise InvalidError("out", f"not within the package, {PACKAGE}: every replay reads its file")
    tuned = dict(replay.read_tuning(out).parameters) if out.exists() else {}
    with workplace() as directory:
        training = replay.training_traces(data)
        typer.echo("training on: " + "; ".join(trace.label for trace in training))
        tuner = replay.Tuner(training, capacity_tokens, directory)
        for name in names:
            best = tuner.tune(name, typer.echo)
            if best:
                tuned[name] = best
            lines = (f"  {json.dumps(n)}: {json.dumps(p)}" for n, p in sorted(tuned.items()))
            out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    typer.echo(f"wrote {out}, parameters {replay.read_tuning(out).digest}")
