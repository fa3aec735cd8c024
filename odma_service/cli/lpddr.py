"""`odma lpddr`: what layouts cost on LPDDR memory, and how far the models can be trusted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from odma_service.cli.lazy import lazily
from odma_service.cli.options import AsJson
from odma_service.cli.output import show
from odma_service.errors import InvalidError, OdmaError
from odma_service.lpddr import layouts, read_device

app = typer.Typer(
    cls=lazily({"validate": "lab.bench.lpddr_validate"}),
    no_args_is_help=True,
    help="Price layouts on LPDDR memory; check the models.",
)


@app.callback()
def _lpddr() -> None:
    pass


@app.command()
def estimate(
    device: Annotated[str, typer.Option(help="mlu370-x4, mlu370-x8 or a file.")] = "mlu370-x4",
    tokens: Annotated[int, typer.Option(help="Length of the sequence.")] = 4096,
    bytes_per_token: Annotated[int, typer.Option(help="Bytes of a token in one plane.")] = 1024,
    planes: Annotated[int, typer.Option(help="Planes; the K or the V of one layer is one.")] = 56,
    window: Annotated[int, typer.Option(help="Runs in flight.")] = 16,
    descriptor_ns: Annotated[
        float | None,
        typer.Option(help="Nanoseconds a run costs on top of its bytes. Default: the device's."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="File to draw bandwidth over run length into.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare what layouts of one KV cache cost: contiguous, in pages, token by token."""
    chosen = read_device(device)
    if descriptor_ns is not None:
        chosen = replace(chosen, descriptor_seconds=descriptor_ns * 1e-9)
    found = layouts.compare(chosen, tokens, bytes_per_token, planes, window)
    if plot is not None:
        _draw(layouts.bandwidth_curves(chosen), plot, f"{device}: bandwidth over run length")
    facts = {
        "device": device,
        "window": window,
        "energy": "ratios only, LPDDR4-derived",
        "layouts": [layout._asdict() for layout in found],
    }
    title = (
        f"{tokens:,} tokens, {planes} planes of {bytes_per_token:,} bytes on {device}, "
        f"{window} in flight, {chosen.descriptor_seconds * 1e9:g} ns a descriptor"
    )
    show(facts, as_json, lambda _: _table(found, title))


def _table(found: list[layouts.Layout], title: str) -> Table:
    table = Table(
        title=title,
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
    return table


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
