"""A table: the rows of a source as they stand there, and the trace that comes of them.

Values that cannot be true (negative, fractional, missing, not a number) are an error that
names the file, the row and the column. Rows count from 1, without header and empty lines.
Rows that may be true but cannot be replayed (nothing in, or nothing out) are dropped, and
the trace's notes say how many.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from odma_service.traces.source import Source
from odma_service.traces.trace import (
    PREFIX_TOKENS,
    Trace,
    TraceError,
    Waits,
    check_names,
    check_seconds,
    check_tokens,
    check_waits,
)

PREFIX_COLUMN = "hash_ids"
LARGEST_ID = 2**63
BYTES_PER_TOKEN = 4
ESTIMATED = f"lengths are estimated from texts: a token for each {BYTES_PER_TOKEN} bytes of UTF-8"

Names = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows, not yet checked, dropped or sorted.

    names        what the file calls the next three
    t_seconds    in units of the file, per_second of them in a second; None: not known
    from_first   times count from the earliest request that can be replayed
    recorded     False: the row has no recorded output
    prefix_ids   of blocks of `block_tokens` tokens
    """

    label: str
    names: Names
    t_seconds: NDArray[Any] | None
    input_tokens: NDArray[Any]
    output_tokens: NDArray[Any]
    request_class: NDArray[np.object_] | None = None
    recorded: NDArray[np.bool_] | None = None
    prefix_ids: list[tuple[int, ...]] | None = None
    notes: tuple[str, ...] = ()
    texts: list[str] | None = None
    tenant: NDArray[np.object_] | None = None
    per_second: float = 1.0
    from_first: bool = False
    block_tokens: int = PREFIX_TOKENS
    waits: Waits | None = None


def trace_of(source: Source, table: Table) -> Trace:
    """Return the trace in a table. Raises TraceError."""
    rows = len(table.input_tokens)
    if rows == 0:
        raise source.wrong("there are no rows in it")
    path = str(source.path)
    arrivals = np.zeros(rows) if table.t_seconds is None else table.t_seconds
    check_seconds(path, table.names[0], arrivals)
    check_tokens(path, table.names[1], table.input_tokens, least=0)
    check_tokens(path, table.names[2], table.output_tokens, least=0)
    for name in ("request_class", "tenant"):
        check_names(path, name, getattr(table, name))
    if table.prefix_ids is not None:
        _check_prefixes(path, table)
    if table.waits is not None:
        check_waits(path, table.waits)

    order, notes = _replayable(table)
    if not order.size:
        raise source.wrong(f"no row can be replayed: {', '.join(notes)}")
    if table.t_seconds is None:
        notes.append("no arrival times: every request arrives at 0")
    if table.from_first:
        arrivals = arrivals - arrivals[order].min()
    in_time = order[np.argsort(arrivals[order], kind="stable")]
    if not np.array_equal(in_time, order):
        notes.append("sorted by arrival: the file's rows were not in that order")
    return Trace(
        arrivals[in_time].astype(np.float64) / table.per_second,
        table.input_tokens[in_time].astype(np.int64),
        table.output_tokens[in_time].astype(np.int64),
        "".join(filter(str.isprintable, table.label)),
        None if table.request_class is None else tuple(table.request_class[in_time].tolist()),
        tuple(notes),
        None if table.prefix_ids is None else tuple(table.prefix_ids[row] for row in in_time),
        None if table.texts is None else tuple(table.texts[row] for row in in_time),
        None if table.tenant is None else tuple(table.tenant[in_time].tolist()),
        table.block_tokens,
        None if table.waits is None else table.waits.part(in_time),
    )


def _check_prefixes(path: str, table: Table) -> None:
    """Refuse ids of more blocks than a prompt has: the blocks are of another size."""
    assert table.prefix_ids is not None
    size = table.block_tokens
    for row, (ids, tokens) in enumerate(
        zip(table.prefix_ids, table.input_tokens.tolist(), strict=True), 1
    ):
        if len(ids) > -(-tokens // size):
            raise TraceError(
                f"{path}: row {row}, column '{PREFIX_COLUMN}': {len(ids)} blocks of {size} tokens"
                f" in a prompt of {tokens:g}; if blocks are smaller, name the format that has"
                " such blocks with --format"
            )


def _replayable(table: Table) -> tuple[NDArray[np.intp], list[str]]:
    """Return the rows that can be replayed, and a note for each kind that cannot."""
    notes = list(table.notes)
    keep = np.ones(len(table.input_tokens), dtype=np.bool_)
    for good, flaw in (
        (table.recorded if table.recorded is not None else keep, "without a recorded output"),
        (table.output_tokens > 0, "with 0 output tokens"),
        (table.input_tokens > 0, "with 0 input tokens"),
    ):
        notes += dropped(int(np.count_nonzero(keep & ~good)), flaw)
        keep = keep & good
    return np.flatnonzero(keep), notes


def dropped(count: int, flaw: str) -> list[str]:
    """Return the note on so many rows that were dropped; none on 0."""
    return [f"dropped {count} {'row' if count == 1 else 'rows'} {flaw}"] if count else []


def columns(rows: Iterable[tuple[float, float, float]]) -> NDArray[np.float64]:
    """Return three columns. A double holds every permitted token count exactly."""
    flat = array("d")
    for row in rows:
        flat.extend(row)
    return np.array(flat).reshape(-1, 3).T


def place(source: Source, names: Sequence[str], name: str) -> int:
    """Return where a column is. Raises TraceError unless there is one such."""
    if names.count(name) != 1:
        times = "twice" if name in names else "missing"
        raise source.wrong(f"column '{name}' is {times}; there are {', '.join(names):.120}")
    return names.index(name)


def number(value: object) -> float:
    """Return a JSON number. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number")
    return float(value)


def value_of(
    source: Source, row: int, name: str, parse: Callable[[Any], float], value: object
) -> float:
    """Return a value parsed. Raises TraceError; what `parse` raises says what it should be."""
    try:
        return parse(value)
    except (ValueError, OverflowError) as error:
        kind = "an ISO time" if str(error) == "an ISO time" else "a number"
        flaw = "missing" if value is None else f"{value!r:.60} is not {kind}"
        raise source.wrong(f"row {row}, column '{name}': {flaw}") from None


def values_of(
    source: Source, row: int, names: Names, record: dict[str, Any]
) -> tuple[float, float, float]:
    """Return the three numbers of a JSON object. Raises TraceError."""
    at, into, out = (value_of(source, row, name, number, record.get(name)) for name in names)
    return at, into, out


def ids_of(source: Source, row: int, value: Any) -> tuple[int, ...]:
    """Return a list of ids; none where a row has none."""
    ids = () if value is None else value
    if not isinstance(ids, list | tuple) or not all(
        type(i) is int and -LARGEST_ID <= i < LARGEST_ID for i in ids
    ):
        raise source.wrong(
            f"row {row}, column '{PREFIX_COLUMN}': not a list of whole numbers of 64 bits"
        )
    return tuple(ids)


def estimated_tokens(source: Source, row: int, name: str, text: object) -> int:
    """Return about how many tokens a text has, at least one of what is not empty."""
    if not isinstance(text, str):
        flaw = "missing" if text is None else f"{text!r:.60} is not a text"
        raise source.wrong(f"row {row}, column '{name}': {flaw}")
    return -(-len(text.encode(errors="replace")) // BYTES_PER_TOKEN)
