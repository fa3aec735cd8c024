"""ServeGen: requests sampled from the published histograms of a production service.

ServeGen (Apache-2.0) has no request log: per client and ten minutes a rate and how bursty
arrivals are, per client and six hours the probabilities of lengths. What is made from them
drifts over days as the service did. Input and output are separate marginals: which input goes
with which output is not known, so they are drawn independently within a client.

As published, a folder has two files for each client:

    chunk-CLIENT-trace.csv      no header; t_seconds, rate, cv, and more that is not used
    chunk-CLIENT-dataset.json   by t_seconds: input_tokens and output_tokens, "{length: share, ...}"

or all clients lie in two files, which need pyarrow:

    NAME_rates*.parquet   client, t_seconds, rate, cv, has_lengths
    NAME_hist*.parquet    client, t_seconds, field, bin, prob
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from odma_service.traces.from_parquet import arrow_modules
from odma_service.traces.source import Source, opened
from odma_service.traces.table import value_of
from odma_service.traces.trace import LARGEST_SECONDS, Trace, TraceError

SLOT_SECONDS = 600
LENGTHS_SECONDS = 6 * 3600
LARGEST_CV = 20.0
FIELDS = ("input_tokens", "output_tokens")
MOST_REQUESTS = 10_000_000
CHUNK = re.compile(r"chunk-(\d{1,9})-trace\.csv")
RATES = ("client", "t_seconds", "rate", "cv")
BINS = ("client", "t_seconds", "field", "bin", "prob")

Columns = dict[str, NDArray[Any]]


class _Lengths(NamedTuple):
    """Values with the sums of their probabilities."""

    values: NDArray[np.int64]
    cumulative: NDArray[np.float64]

    def draw(self, count: int, random: np.random.Generator) -> NDArray[np.int64]:
        places = np.searchsorted(self.cumulative, random.random(count) * self.cumulative[-1])
        drawn: NDArray[np.int64] = self.values[np.minimum(places, len(self.values) - 1)]
        return drawn


def sample_servegen(
    *source: str | Path,
    rows: int,
    seed: int,
    start_hours: float = 0.0,
    hours: float = 6.0,
) -> Trace:
    """Return about `rows` requests of a window; the same for the same arguments.

    `source` is a folder as published, or a file of rates and one of histograms. Rates are scaled
    by one factor, so that the mix of clients and its drift stay; only clients with known lengths
    take part. Raises TraceError.
    """
    if not 1 <= rows <= MOST_REQUESTS:
        raise TraceError(f"rows must be from 1 to {MOST_REQUESTS}, not {rows}")
    begin, end = start_hours * 3600, (start_hours + hours) * 3600
    if len(source) not in (1, 2):
        raise TraceError(f"a folder, or a file of rates and one of histograms, not {len(source)}")
    paths = [Path(path) for path in source]
    rates, histograms = paths[0], paths[-1]
    table, bins = _published(rates) if len(paths) == 1 else _columns(rates, histograms)
    known = table["has_lengths"] & (table["rate"] > 0)
    inside = known & (table["t_seconds"] >= begin) & (table["t_seconds"] < end)
    if not inside.any():
        raise TraceError(
            f"{rates}: no client with lengths sends anything between hours {start_hours:g}"
            f" and {start_hours + hours:g}"
        )
    lengths = _lengths(bins, begin, end)
    slots = [
        slot
        for slot in zip(
            *(table[name][inside].tolist() for name in ("client", "t_seconds", "rate", "cv")),
            strict=True,
        )
        if _key(slot[0], slot[1], FIELDS[0]) in lengths
        and _key(slot[0], slot[1], FIELDS[1]) in lengths
    ]
    if not slots:
        raise TraceError(f"{histograms}: no lengths for the clients of that window")
    scale = rows / sum(rate * SLOT_SECONDS for _, _, rate, _ in slots)
    random = np.random.default_rng(seed)
    times: list[NDArray[np.float64]] = []
    inputs: list[NDArray[np.int64]] = []
    outputs: list[NDArray[np.int64]] = []
    for client, at, rate, cv in slots:
        arrivals = _arrivals(rate * SLOT_SECONDS * scale, cv, random)
        times.append(arrivals + (at - begin))
        for field, into in zip(FIELDS, (inputs, outputs), strict=True):
            into.append(lengths[_key(client, at, field)].draw(len(arrivals), random))
    t_seconds = np.concatenate(times)
    if not t_seconds.size:
        raise TraceError("no request was drawn: ask for more rows")
    order = np.argsort(t_seconds, kind="stable")
    label = rates.resolve().name if rates.is_dir() else rates.stem.replace("_rates", "")
    return Trace(
        t_seconds[order],
        np.concatenate(inputs)[order],
        np.concatenate(outputs)[order],
        f"servegen {label} hours {start_hours:g}+{hours:g} seed={seed}",
        None,
        ("sampled: input and output lengths are independent within a client",),
    )


def _arrivals(expected: float, cv: float, random: np.random.Generator) -> NDArray[np.float64]:
    """Return times within a slot: gaps are Gamma with the given variation."""
    count = int(random.poisson(expected))
    if count == 0:
        return np.empty(0)
    shape = 1 / min(max(cv, 0.1), LARGEST_CV) ** 2
    places = np.cumsum(random.gamma(shape, 1.0, count + 1) + 1e-12)
    times: NDArray[np.float64] = places[:-1] / places[-1] * SLOT_SECONDS
    return times


def _lengths(table: Columns, begin: float, end: float) -> dict[tuple[int, int, str], _Lengths]:
    """Return what is known of the windows that touch [begin, end), by client and field."""
    near = (table["t_seconds"] > begin - LENGTHS_SECONDS) & (table["t_seconds"] < end)
    near &= np.isin(table["field"], FIELDS) & (table["prob"] > 0)
    client, window, field, value, weight = (
        table[name][near] for name in ("client", "t_seconds", "field", "bin", "prob")
    )
    which = client.astype(np.int64) * 2 + (field == FIELDS[1])
    order = np.lexsort((value, window, which))
    keys = np.stack((which[order], window[order].astype(np.int64)))
    if not order.size:
        return {}
    cuts = np.flatnonzero((np.diff(keys, axis=1) != 0).any(axis=0)) + 1
    found = {}
    for part in np.split(order, cuts):
        first = part[0]
        tokens = np.maximum(np.rint(value[part]).astype(np.int64), 1)
        key = int(client[first]), int(window[first]) // LENGTHS_SECONDS, str(field[first])
        found[key] = _Lengths(tokens, np.cumsum(weight[part]))
    return found


def _key(client: int, at: float, field: str) -> tuple[int, int, str]:
    return client, int(at) // LENGTHS_SECONDS, field


def _columns(rates: Path, histograms: Path) -> tuple[Columns, Columns]:
    return _read(rates, (*RATES, "has_lengths")), _read(histograms, BINS)


def _read(path: Path, columns: tuple[str, ...]) -> Columns:
    arrow, parquet = arrow_modules(path)
    try:
        table = parquet.read_table(path, columns=list(columns))
        return {name: table.column(name).to_numpy() for name in columns}
    except (OSError, KeyError, arrow.ArrowException) as error:
        raise TraceError(f"{path}: {error}") from error


def _published(folder: Path) -> tuple[Columns, Columns]:
    """Return the rates and the bins of all clients in a folder."""
    if not folder.is_dir():
        raise TraceError(f"{folder}: not a folder; name one, or two files: rates and histograms")
    traces = {
        int(found[1]): path
        for path in sorted(folder.iterdir())
        if (found := CHUNK.fullmatch(path.name))
    }
    if not traces:
        raise TraceError(f"{folder}: no chunk-*-trace.csv in it")
    slots: list[tuple[int, float, float, float]] = []
    bins: list[tuple[int, float, str, float, float]] = []
    for client, path in sorted(traces.items()):
        with opened(path) as source:
            slots += [(client, *values) for values in _slots_of(source)]
        dataset = path.with_name(path.name.replace("-trace.csv", "-dataset.json"))
        with opened(dataset) as source:
            bins += [(client, *values) for values in _bins_of(source)]
    known = {client for client, *_ in bins}
    has_lengths = np.array([client in known for client, *_ in slots], np.bool_)
    return _by_name(RATES, slots) | {"has_lengths": has_lengths}, _by_name(BINS, bins)


def _by_name(names: tuple[str, ...], rows: list[Any]) -> Columns:
    return {name: np.array([row[i] for row in rows]) for i, name in enumerate(names)}


def _slots_of(source: Source) -> Iterator[tuple[float, float, float]]:
    for row, cells in enumerate(source.cells(), 1):
        if len(cells) < len(RATES) - 1:
            raise source.wrong(f"row {row}: {len(cells)} columns, but a time, a rate and a cv")
        at, rate, cv = (
            value_of(source, row, name, _from_0, cell)
            for name, cell in zip(RATES[1:], cells, strict=False)
        )
        yield at, rate, cv


def _bins_of(source: Source) -> Iterator[tuple[float, str, float, float]]:
    [(_, windows), *_] = source.records(1)
    for row, (at, fields) in enumerate(windows.items(), 1):
        seconds = value_of(source, row, "t_seconds", _from_0, at)
        for field in FIELDS if isinstance(fields, dict) else ():
            for pair in filter(str.strip, str(fields.get(field, "")).strip("{} \n").split(",")):
                value, _, share = pair.partition(":")
                yield (
                    seconds,
                    field,
                    value_of(source, row, field, _from_0, value.strip(" '\"")),
                    value_of(source, row, field, _from_0, share),
                )


def _from_0(text: str) -> float:
    value = float(text)
    if not 0 <= value <= LARGEST_SECONDS:
        raise ValueError("a number")
    return value
