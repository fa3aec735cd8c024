"""`odma lpddr`: what layouts cost on LPDDR memory, and how far the models can be trusted.

A failure is one line on stderr and exit code 2.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from odma_service.errors import InvalidError, OdmaError
from odma_service.lpddr import layouts, read_device, rows

app = typer.Typer(no_args_is_help=True, help="Price layouts on LPDDR memory; check the models.")


@app.command()
def estimate(
    device: Annotated[str, typer.Option(help="mlu370-x4, mlu370-x8 or a file.")] = "mlu370-x4",
    tokens: Annotated[int, typer.Option(help="Length of the sequence.")] = 4096,
    bytes_per_token: Annotated[int, typer.Option(help="Of a token in one plane.")] = 1024,
    planes: Annotated[int, typer.Option(help="The K or V of one layer is a plane.")] = 56,
    window: Annotated[int, typer.Option(help="Runs in flight.")] = 16,
    descriptor_ns: Annotated[
        float | None, typer.Option(help="Cost of one run, instead of the device's.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw bandwidth over run length into this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare layouts of one sequence's KV cache: contiguous, paged, per token."""
    chosen = read_device(device)
    if descriptor_ns is not None:
        chosen = replace(chosen, descriptor_seconds=descriptor_ns * 1e-9)
    if not 0 <= chosen.descriptor_seconds <= 1:
        raise InvalidError("descriptor_ns", "0 to 1e9")
    found = layouts.compare(chosen, tokens, bytes_per_token, planes, window)
    if plot is not None:
        _draw(layouts.bandwidth_curves(chosen), plot, f"{device}: bandwidth over run length")
    if as_json:
        facts = {"device": device, "window": window, "energy": "ratios only, LPDDR4-derived"}
        typer.echo(json.dumps(facts | {"layouts": [layout._asdict() for layout in found]}))
        return
    table = Table(
        title=f"{tokens:,} tokens, {planes} planes of {bytes_per_token:,} bytes on {device}, "
        f"{window} in flight, {chosen.descriptor_seconds * 1e9:g} ns a descriptor",
        caption="Energy is relative and LPDDR4-derived. These are models, not a card.",
        title_justify="left",
    )
    table.add_column("layout", no_wrap=True)
    for heading in ("run", "runs", "time", "GB/s", "relative", "opened", "energy"):
        table.add_column(heading, justify="right")
    for layout in found:
        table.add_row(
            layout.name,
            f"{layout.run_bytes / 1024:g} KiB",
            f"{layout.runs:,}",
            f"{layout.seconds * 1e3:,.2f} ms",
            f"{layout.bytes_per_second / 1e9:.1f}",
            f"{layout.relative_bandwidth:.2f}",
            f"{layout.activations / 1000:,.0f}k",
            f"{layout.relative_energy:.2f}",
        )
    Console().print(table)


@app.command()
def validate(
    files: Annotated[list[Path], typer.Argument(help="CSV files of reference rows.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Play every configuration of reference files here, and score the difference."""
    reference = [row for file in files for row in rows.read_rows(file)]
    outcomes = list(rows.play(reference, time.process_time))
    scores = rows.score(outcomes)
    scores["estimator"]["runs_per_second"] = rows.estimator_runs_per_second(time.process_time)
    if as_json:
        typer.echo(json.dumps(scores | {"outcomes": [_outcome(one) for one in outcomes]}))
        return
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
    Console().print(table)


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


def _draw(curves: dict[int, list[float]], path: Path, title: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise OdmaError("--plot needs matplotlib: pip install 'odma-service[plots]'") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for window, speeds in curves.items():
        axes.plot(layouts.PLOTTED_BYTES, [speed / 1e9 for speed in speeds], label=str(window))
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set(title=title, xlabel="run length, bytes", ylabel="GB/s")
    axes.legend(title="runs in flight")
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InvalidError("plot", str(error)) from None
