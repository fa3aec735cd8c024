"""Traces in CSV with a header: Azure's, BurstGPT's, vidur's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice

import numpy as np

from odma_service.traces.source import Source
from odma_service.traces.table import Names, Table, columns, place, value_of

AZURE: Names = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT: Names = ("Timestamp", "Request tokens", "Response tokens")
BURSTGPT_CLASS = "Model"
VIDUR: Names = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


def read_azure(source: Source, rows: int | None) -> Table:
    """Read Azure's traces of 2023 and 2024: ISO times."""
    header, body = _rows(source, rows)
    microseconds, inputs, outputs = columns(_values(source, header, body, AZURE, _microseconds))
    t_seconds = (microseconds - microseconds.min(initial=np.inf)) / 1e6
    return Table(source.label, AZURE, t_seconds, inputs, outputs)


def read_burstgpt(source: Source, rows: int | None) -> Table:
    """Read BurstGPT: seconds; a failed request has no response tokens; models are classes."""
    header, body = _rows(source, rows)
    model = place(source, header, BURSTGPT_CLASS)
    models: list[str] = []

    def noted() -> Iterator[list[str]]:
        for cells in body:
            models.append(cells[model])
            yield cells

    seconds, inputs, outputs = columns(_values(source, header, noted(), BURSTGPT, float))
    classes = np.array(models, object)
    return Table(source.label, BURSTGPT, seconds, inputs, outputs, classes, from_first=True)


def read_vidur(source: Source, rows: int | None) -> Table:
    """Read vidur's traces: seconds; its sets of lengths have no times."""
    header, body = _rows(source, rows)
    if VIDUR[0] in header:
        seconds, inputs, outputs = columns(_values(source, header, body, VIDUR, float))
        return Table(source.label, VIDUR, seconds, inputs, outputs, from_first=True)
    lengths = (VIDUR[1], *VIDUR[1:])
    _, inputs, outputs = columns(_values(source, header, body, lengths, float))
    return Table(source.label, VIDUR, None, inputs, outputs)


def _rows(source: Source, rows: int | None) -> tuple[list[str], Iterator[list[str]]]:
    lines = source.cells()
    header = [name.strip() for name in next(lines, [])]

    def body() -> Iterator[list[str]]:
        for row, cells in enumerate(islice(lines, rows), 1):
            if len(cells) != len(header):
                raise source.wrong(f"row {row}: {len(cells)} of {len(header)} columns")
            yield cells

    return header, body()


def _values(
    source: Source,
    header: list[str],
    body: Iterator[list[str]],
    names: Names,
    time: Callable[[str], float],
) -> Iterator[tuple[float, float, float]]:
    at, into, out = (place(source, header, name) for name in names)
    for row, cells in enumerate(body, 1):
        yield (
            value_of(source, row, names[0], time, cells[at]),
            value_of(source, row, names[1], float, cells[into]),
            value_of(source, row, names[2], float, cells[out]),
        )


def _microseconds(text: str) -> float:
    """Return an ISO time in microseconds since 1970, exact; without an offset it is UTC."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("an ISO time") from None
    if "-" not in text:  # a bare number is one of seconds rather than a date
        raise ValueError("an ISO time")
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return float((moment - EPOCH) // MICROSECOND)
