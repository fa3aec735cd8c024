"""Trace files: many formats in (see formats.py), parquet out."""

from __future__ import annotations

from pathlib import Path

from odma_service.traces.formats import named, recognised
from odma_service.traces.from_parquet import write_trace
from odma_service.traces.source import opened
from odma_service.traces.table import trace_of
from odma_service.traces.trace import Trace, TraceError


def read_trace(path: str | Path, rows: int | None = None, form: str | None = None) -> Trace:
    """Return the trace in a file or a pipe, in arrival order.

    With `rows`, only the first `rows` rows of the file are used. The trace may be shorter,
    because rows that cannot be replayed are dropped. `form` names the format; without it the
    content tells. Raises TraceError.
    """
    if rows is not None and rows < 1:
        raise TraceError(f"rows must be at least 1, not {rows}")
    with opened(Path(path), named=form is not None) as source:
        chosen = recognised(source) if form is None else named(source, form)
        return trace_of(source, chosen.reader(source, rows))


def import_trace(source: str | Path, destination: str | Path, form: str | None = None) -> Trace:
    """Read a trace of any known format, write it as parquet and return it. Raises TraceError."""
    trace = read_trace(source, form=form)
    write_trace(trace, destination)
    return trace
