"""`odma trace`: describe, generate and import request traces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from odma_service import traces
from odma_service.cli.lazy import Commands
from odma_service.cli.options import AsJson, TraceFormat
from odma_service.cli.output import show

KNOWN = f"A trace: {', '.join(traces.FORMATS)}"

app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Describe, generate and import request traces."
)


@app.command()
def describe(
    file: Annotated[Path, typer.Argument(help=f"{KNOWN}; may be gzip or a pipe.")],
    form: TraceFormat = None,
    as_json: AsJson = False,
) -> None:
    """Show a trace's size, rate, lengths and cap."""
    description = traces.describe(traces.read_trace(file, form=form))
    show(asdict(description), as_json, lambda _: _picture(description))


@app.command()
def generate(
    out: Annotated[Path, typer.Argument(help="The parquet file to write.")],
    rows: Annotated[int, typer.Option(help="Number of requests.")] = 3_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same trace.")] = 1,
) -> None:
    """Write a synthetic trace: heavy-tailed, drifting, the same for the same seed."""
    trace = traces.generate(rows, seed)
    traces.write_trace(trace, out)
    _report(trace, out)


@app.command()
def servegen(
    source: Annotated[
        list[Path],
        typer.Argument(help="A folder of ServeGen's data, or a *_rates and a *_hist parquet file."),
    ],
    out: Annotated[Path, typer.Argument(help="The parquet file to write.")],
    start_hours: Annotated[float, typer.Option(min=0, help="Where the window begins.")] = 0.0,
    hours: Annotated[float, typer.Option(min=1 / 6, help="How long it is.")] = 6.0,
    rows: Annotated[int, typer.Option(min=1, help="Requests, about: rates are scaled.")] = 3_000,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same trace.")] = 1,
) -> None:
    """Sample a trace that drifts as a production service did, over hours or days."""
    trace = traces.sample_servegen(
        *source, rows=rows, seed=seed, start_hours=start_hours, hours=hours
    )
    traces.write_trace(trace, out)
    _report(trace, out)


@app.command("import")
def import_(
    src: Annotated[Path, typer.Argument(help=f"{KNOWN}; may be gzip or a pipe.")],
    out: Annotated[Path, typer.Argument(help="The parquet file to write.")],
    form: TraceFormat = None,
) -> None:
    """Turn a trace of any known format into parquet."""
    trace = traces.import_trace(src, out, form)
    _report(trace, out)


def _report(trace: traces.Trace, out: Path) -> None:
    for note in trace.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"wrote {len(trace):,} requests of {trace.label} to {out}")


def _picture(description: traces.Description) -> RenderableType:
    arrivals = Table(title=Text(description.label), show_header=False, title_justify="left")
    for name, value in _facts(description):
        arrivals.add_row(name, Text(value))
    lengths = Table("tokens", title="lengths", title_justify="left")
    for field in fields(traces.Spread):
        lengths.add_column(field.name, justify="right")
    for name in ("input", "output", "total"):
        spread = getattr(description, f"{name}_tokens")
        lengths.add_row(name, *(f"{value:,.0f}" for value in astuple(spread)))
    notes = (Text(f"note: {note}") for note in description.notes)
    return Group(arrivals, lengths, *notes)


def _facts(description: traces.Description) -> Iterator[tuple[str, str]]:
    yield "requests", f"{description.requests:,}"
    for name, requests in (description.requests_by_class or {}).items():
        yield f"  of class {name}", f"{requests:,}"
    if description.waiting_requests:
        waiting, sessions = description.waiting_requests, description.sessions
        of = "" if sessions is None else f", in {sessions:,} sessions"
        yield "wait for an answer", f"{waiting:,}{of}"
    yield "duration", f"{description.duration_seconds:,.1f} s"
    if description.requests_per_second is not None:
        yield "rate", f"{description.requests_per_second:,.3g} requests/s"
        yield "variation between arrivals", f"{description.interarrival_cv:.2f} (Poisson is 1)"
    outputs, share = description.outputs_at_maximum, description.outputs_at_maximum_share
    yield "outputs at the maximum", f"{outputs:,} ({share:.2%}; many mean a cap)"
