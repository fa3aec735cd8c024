"""ServeGen: requests sampled from the published histograms of a production service.

ServeGen (Apache-2.0) has no request log: per client and ten minutes a rate and how bursty
arrivals are, per client and six hours the probabilities of lengths. What is made from them
drifts over days as the service did. Input and output are separate marginals: which input goes
with which output is not known, so they are drawn independently within a client.

    NAME_rates*.parquet   client, t_seconds, rate, cv, has_lengths
    NAME_hist*.parquet    client, t_seconds, field, bin, prob
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from odma_service.traces.from_parquet import arrow_modules
from odma_service.traces.trace import Trace, TraceError

SLOT_SECONDS = 600
LENGTHS_SECONDS = 6 * 3600
LARGEST_CV = 20.0
FIELDS = ("input_tokens", "output_tokens")
MOST_REQUESTS = 10_000_000


class _Lengths(NamedTuple):
    """Values with the sums of their probabilities."""

    values: NDArray[np.int64]
    cumulative: NDArray[np.float64]

    def draw(self, count: int, random: np.random.Generator) -> NDArray[np.int64]:
        places = np.searchsorted(self.cumulative, random.random(count) * self.cumulative[-1])
        drawn: NDArray[np.int64] = self.values[np.minimum(places, len(self.values) - 1)]
        return drawn


def sample_servegen(
    rates: str | Path,
    histograms: str | Path,
    *,
    rows: int,
    seed: int,
    start_hours: float = 0.0,
    hours: float = 6.0,
) -> Trace:
    """Return about `rows` requests of a window; the same for the same arguments.

    Rates are scaled by one factor, so that the mix of clients and its drift stay; only
    clients with known lengths take part. Raises TraceError.
    """
    if not 1 <= rows <= MOST_REQUESTS:
        raise TraceError(f"rows must be from 1 to {MOST_REQUESTS}, not {rows}")
    begin, end = start_hours * 3600, (start_hours + hours) * 3600
    table = _read(Path(rates), ("client", "t_seconds", "rate", "cv", "has_lengths"))
    known = table["has_lengths"] & (table["rate"] > 0)
    inside = known & (table["t_seconds"] >= begin) & (table["t_seconds"] < end)
    if not inside.any():
        raise TraceError(
            f"{rates}: nothing between hours {start_hours:g} and {start_hours + hours:g}"
        )
    lengths = _lengths(Path(histograms), begin, end)
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
    label = Path(rates).stem.replace("_rates", "")
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


def _lengths(path: Path, begin: float, end: float) -> dict[tuple[int, int, str], _Lengths]:
    """Return what is known of the windows that touch [begin, end), by client and field."""
    table = _read(path, ("client", "t_seconds", "field", "bin", "prob"))
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


def _read(path: Path, columns: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    arrow, parquet = arrow_modules(path)
    try:
        table = parquet.read_table(path, columns=list(columns))
        return {name: table.column(name).to_numpy() for name in columns}
    except (OSError, KeyError, arrow.ArrowException) as error:
        raise TraceError(f"{path}: {error}") from error
