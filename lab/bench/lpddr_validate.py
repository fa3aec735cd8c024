"""`odma lpddr validate`: how far the LPDDR models can be trusted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lab.bench import lpddr_rows as rows
from odma_service.cli.options import AsJson
from odma_service.cli.output import show

app = typer.Typer()


@app.command()
def command(
    files: Annotated[list[Path], typer.Argument(help="CSV files of reference rows.")],
    as_json: AsJson = False,
) -> None:
    """Play every configuration of reference files here, and score the difference."""
    reference = [row for file in files for row in rows.read_rows(file)]
    outcomes = list(rows.play(reference, time.process_time))
    scores = rows.score(outcomes)
    scores["estimator"]["runs_per_second"] = rows.estimator_runs_per_second(time.process_time)
    show(scores | {"outcomes": [_outcome(one) for one in outcomes]}, as_json, _table)


def _table(scores: dict[str, Any]) -> Table:
    table = Table("part", title="Error against the reference rows", title_justify="left")
    for heading in ("rows", "mean", "max", "ranks", "activations", "requests/s"):
        table.add_column(heading, justify="right")
    for name, part in (
        ("one channel", scores),
        ("device", scores["device"]),
        ("estimator", scores["estimator"]),
        ("other rows", scores["other"]),
        ("second simulator", scores["other"]["second_simulator"]),
    ):
        table.add_row(
            name,
            str(part["rows"]),
            _shown(part["mean_abs_rel_error"], "{:.2%}"),
            _shown(part["max_abs_rel_error"], "{:.2%}"),
            _shown(part["rank_correlation"], "{:.3f}"),
            _shown(part.get("activation_error"), "{:.2%}"),
            _shown(part.get("requests_per_second"), "{:,.0f}"),
        )
    return table


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _outcome(outcome: rows.Outcome) -> dict[str, Any]:
    row = outcome.row
    return {
        "row": row.where,
        "part": row.part,
        "config": row.config,
        "mapping": row.mapping,
        "chunk_bytes": row.chunk_bytes,
        "write_fraction": row.write_fraction,
        "reference": row.fraction_of_peak,
        "model": outcome.fraction_of_peak,
        "estimator": outcome.estimated_fraction,
        "miss_rate": outcome.miss_rate,
    }
