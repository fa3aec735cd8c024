"""`odma reproduce`: the paper's tables and its reviewers' questions, as a report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from lab.bench.replay import recalibration_seconds
from lab.paper.bucket_accuracy import Predicted
from lab.paper.reproduce import reproduce
from odma_service import replay, traces
from odma_service.learning.predictor import Predictor, default_model
from odma_service.replay.workplace import workplace
from predictor_onnx.evaluate import DELAY, predictions
from predictor_onnx.rows import read_rows, running

DRIFT_HOURS = 336.0
PREDICTED = ("alpaca_random9k", "alpaca_eval", "nq_open", "gpteacher", "reasoning_gym")
"""The paper's prompts, or what is nearest to them here, and two sets that our model knows."""


app = typer.Typer()


@app.command()
def command(
    out: Annotated[
        Path, typer.Option(help="Directory for reproduce.md and reproduce.json.")
    ] = Path("reproduced"),
    data: Annotated[
        Path,
        typer.Option(
            help="Folder with servegen/, for a trace of 14 days that drifts, and with text/, for"
            " the predictor's accuracy."
        ),
    ] = Path("../shared/data"),
    rows: Annotated[int, typer.Option(min=100, help="Requests of each load.")] = 1_500,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs of each made load.")] = 5,
) -> None:
    """Reproduce the paper's tables under our policies, and name the differences."""
    servegen = data / "servegen"
    drifting = []
    try:
        drifting.append(
            traces.sample_servegen(
                servegen / "m_large_rates.parquet",
                servegen / "m_large_hist.parquet",
                rows=2 * rows,
                seed=7,
                hours=DRIFT_HOURS,
            )
        )
    except traces.TraceError as error:
        typer.echo(f"note: without a trace of 14 days: {error}", err=True)
    with workplace() as directory:
        text, facts = reproduce(
            rows,
            seeds,
            drifting,
            replay.read_tuning(),
            directory,
            recalibration_seconds() * 1e3,
            list(_predicted(data / "text")),
            lambda stage: typer.echo(f"{stage} ...", err=True),
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "reproduce.md").write_text(text)
    (out / "reproduce.json").write_text(json.dumps(facts, indent=1) + "\n")
    typer.echo(text)
    typer.echo(f"wrote {out / 'reproduce.md'}", err=True)


def _predicted(folder: Path) -> Iterator[Predicted]:
    """Predict the sets that are there, as the service would: a running history, 64 rows late."""
    model = Predictor.load(default_model())
    for name in PREDICTED:
        file = folder / f"{name}.parquet"
        if not file.exists():
            typer.echo(f"note: without the predictor's accuracy on {name}: no {file}", err=True)
            continue
        known = read_rows(file, split="train").output_tokens
        rows, histories = running(read_rows(file, without="train"), DELAY, 0)
        tokens = np.expm1(predictions(model, rows, histories))
        yield Predicted(name, model.version, known, rows.output_tokens, tokens[:, 2], tokens[:, 5])
