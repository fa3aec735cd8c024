"""Trace files: four formats in, one out.

A file's first bytes say what it is; its name does not matter for reading.

    parquet          t_seconds (optional), input_tokens, output_tokens; request_class and tenant
                     (optional); output_recorded (optional): rows where it is false are dropped;
                     hash_ids (optional): see Trace.prefix_ids. Or a set of prompts: prompt,
                     prompt_tokens, output_tokens; model, reasoning_hidden, split (optional)
    Azure CSV        TIMESTAMP, ContextTokens, GeneratedTokens, as published in 2023 and 2024;
                     times then count from the earliest request
    Mooncake JSONL   timestamp (milliseconds), input_length, output_length; hash_ids (optional)
    decision log     as `odma serve --decision-log` writes it: asked, prompt_tokens, output_tokens,
                     request_class, tenant; times then count from the earliest request

Values that cannot be true (negative, fractional, missing, not a number) are an error that
names the file, the row and the column. Rows count from 1, without header and empty lines.
Rows that may be true but cannot be replayed (nothing in, or nothing out) are dropped, and
the trace's notes say how many.

Parquet needs pyarrow, an optional extra; the other formats do without.
"""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from odma_service.traces.trace import Trace, TraceError, check_seconds, check_tokens

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_COLUMNS = ("timestamp", "input_length", "output_length")
DECISION_COLUMNS = ("asked", "prompt_tokens", "output_tokens")
DECISION_START = '{"odma":'
ENDED_BY_ITSELF = {"FINISHED", "HIT_LIMIT"}
PARQUET_COLUMNS = ("t_seconds", "input_tokens", "output_tokens")
TEXT_COLUMNS = ("request_class", "tenant")
PREFIX_COLUMN = "hash_ids"
PROMPT_COLUMNS = ("prompt", "prompt_tokens", "output_tokens")
UNTRAINED = "val"
LONGEST_CLASS_CHARACTERS = 32
END_CHARACTERS = 1_024
LABEL_KEY = b"odma.label"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


def read_trace(path: str | Path, rows: int | None = None) -> Trace:
    """Return the trace in a file of any known format, in arrival order.

    With `rows`, only the first `rows` rows of the file are used. The trace may be shorter,
    because rows that cannot be replayed are dropped. Raises TraceError.
    """
    path = Path(path)
    if rows is not None and rows < 1:
        raise TraceError(f"rows must be at least 1, not {rows}")
    try:
        table = _reader_of(path)(path, rows)
    except OSError as error:
        raise _unusable(path, error) from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not UTF-8 text") from error
    return _trace_of(path, table)


def write_trace(trace: Trace, path: str | Path) -> None:
    """Write the trace and its label as parquet. Raises TraceError.

    The name must end in .parquet: swapped arguments then overwrite no CSV or JSONL.
    """
    path = Path(path)
    if path.suffix != ".parquet":
        raise TraceError(f"{path}: traces are written as parquet, so name the file *.parquet")
    arrow, parquet = arrow_modules(path)
    columns: dict[str, Any] = {name: getattr(trace, name) for name in PARQUET_COLUMNS}
    for name in TEXT_COLUMNS:
        if getattr(trace, name) is not None:
            columns[name] = arrow.array(getattr(trace, name), type=arrow.string())
    if trace.prefix_ids is not None:
        columns[PREFIX_COLUMN] = arrow.array(trace.prefix_ids, type=arrow.list_(arrow.int64()))
    label = trace.label.encode("utf-8", errors="replace")
    try:
        parquet.write_table(arrow.table(columns, metadata={LABEL_KEY: label}), path)
    except OSError as error:
        raise _unusable(path, error) from error


def import_trace(source: str | Path, destination: str | Path) -> Trace:
    """Read a trace of any known format, write it as parquet and return it. Raises TraceError."""
    trace = read_trace(source)
    write_trace(trace, destination)
    return trace


@dataclass(frozen=True, slots=True)
class _Table:
    """A file's rows as they stand there, not yet checked, dropped or sorted."""

    label: str
    names: tuple[str, str, str]  # what the file calls the next three
    t_seconds: NDArray[Any] | None
    input_tokens: NDArray[Any]
    output_tokens: NDArray[Any]
    request_class: NDArray[np.object_] | None = None
    recorded: NDArray[np.bool_] | None = None
    prefix_ids: list[tuple[int, ...]] | None = None
    notes: tuple[str, ...] = ()
    texts: list[str] | None = None
    tenant: NDArray[np.object_] | None = None


def _trace_of(path: Path, table: _Table) -> Trace:
    rows = len(table.input_tokens)
    if rows == 0:
        raise TraceError(f"{path}: there are no rows in it")
    arrivals = np.zeros(rows) if table.t_seconds is None else table.t_seconds
    check_seconds(str(path), table.names[0], arrivals)
    check_tokens(str(path), table.names[1], table.input_tokens, least=0)
    check_tokens(str(path), table.names[2], table.output_tokens, least=0)

    order, notes = _replayable(table)
    if not order.size:
        raise TraceError(f"{path}: no row can be replayed: {', '.join(notes)}")
    if table.t_seconds is None:
        notes.append("no arrival times: every request arrives at 0")
    in_time = order[np.argsort(arrivals[order], kind="stable")]
    if not np.array_equal(in_time, order):
        notes.append("sorted by arrival: the file's rows were not in that order")
    return Trace(
        arrivals[in_time].astype(np.float64),
        table.input_tokens[in_time].astype(np.int64),
        table.output_tokens[in_time].astype(np.int64),
        "".join(filter(str.isprintable, table.label)),
        None if table.request_class is None else tuple(table.request_class[in_time].tolist()),
        tuple(notes),
        None if table.prefix_ids is None else tuple(table.prefix_ids[row] for row in in_time),
        None if table.texts is None else tuple(table.texts[row] for row in in_time),
        None if table.tenant is None else tuple(table.tenant[in_time].tolist()),
    )


def _replayable(table: _Table) -> tuple[NDArray[np.intp], list[str]]:
    """Return the rows that can be replayed, and a note for each kind that cannot."""
    notes = list(table.notes)
    keep = np.ones(len(table.input_tokens), dtype=np.bool_)
    for good, flaw in (
        (table.recorded if table.recorded is not None else keep, "without a recorded output"),
        (table.output_tokens > 0, "with 0 output tokens"),
        (table.input_tokens > 0, "with 0 input tokens"),
    ):
        dropped = np.count_nonzero(keep & ~good)
        if dropped:
            notes.append(f"dropped {dropped} {'row' if dropped == 1 else 'rows'} {flaw}")
        keep = keep & good
    return np.flatnonzero(keep), notes


def _reader_of(path: Path) -> Callable[[Path, int | None], _Table]:
    with path.open("rb") as file:
        head = file.read(4096)
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if not text:
        raise TraceError(f"{path}: the file is empty")
    if text.startswith("PAR1"):
        return _read_parquet
    if text.startswith(DECISION_START):
        return _read_decisions
    if text.startswith("{"):
        return _read_mooncake
    if any(name in text.splitlines()[0] for name in AZURE_COLUMNS):
        return _read_azure
    raise TraceError(
        f"{path}: not a trace; known are parquet ({', '.join(PARQUET_COLUMNS)}),"
        f" Azure CSV ({', '.join(AZURE_COLUMNS)}),"
        f" Mooncake JSONL ({', '.join(MOONCAKE_COLUMNS)})"
        f" and decision logs ({DECISION_START}...)"
    )


def _read_azure(path: Path, rows: int | None) -> _Table:
    microseconds, inputs, outputs = _columns(_azure_rows(path, rows))
    t_seconds = (microseconds - microseconds.min(initial=np.inf)) / 1e6
    return _Table(path.stem, AZURE_COLUMNS, t_seconds, inputs, outputs)


def _azure_rows(path: Path, rows: int | None) -> Iterator[tuple[float, float, float]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = filter(None, csv.reader(file))
        try:
            header = next(lines)
            at, into, out = (_place(path, header, name) for name in AZURE_COLUMNS)
            for row, cells in enumerate(islice(lines, rows), 1):
                if len(cells) != len(header):
                    raise TraceError(f"{path}: row {row}: {len(cells)} of {len(header)} columns")
                yield (
                    _value(path, row, AZURE_COLUMNS[0], _microseconds, cells[at]),
                    _value(path, row, AZURE_COLUMNS[1], float, cells[into]),
                    _value(path, row, AZURE_COLUMNS[2], float, cells[out]),
                )
        except csv.Error as error:
            raise TraceError(f"{path}: not a CSV: {error}") from error


def _microseconds(text: str) -> float:
    """Return an ISO time in microseconds since 1970, exact; without an offset it is UTC."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return float((moment - EPOCH) // MICROSECOND)


def _read_mooncake(path: Path, rows: int | None) -> _Table:
    prefixes: list[tuple[int, ...]] = []
    milliseconds, inputs, outputs = _columns(_mooncake_rows(path, rows, prefixes))
    check_seconds(str(path), MOONCAKE_COLUMNS[0], milliseconds)
    return _Table(
        path.stem,
        MOONCAKE_COLUMNS,
        milliseconds / 1e3,
        inputs,
        outputs,
        prefix_ids=prefixes if any(prefixes) else None,
    )


def _mooncake_rows(
    path: Path, rows: int | None, prefixes: list[tuple[int, ...]]
) -> Iterator[tuple[float, float, float]]:
    for row, record in _records(path, rows):
        at, into, out = (
            _value(path, row, name, _number, record.get(name)) for name in MOONCAKE_COLUMNS
        )
        prefixes.append(_ids(path, row, record.get(PREFIX_COLUMN, ())))
        yield at, into, out


def _records(path: Path, rows: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a file with one on each line, and their rows."""
    with path.open(encoding="utf-8-sig") as file:
        for row, line in enumerate(islice(filter(str.strip, file), rows), 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise TraceError(f"{path}: row {row}: not a JSON object")
            yield row, record


def _read_decisions(path: Path, rows: int | None) -> _Table:
    """Return the requests that ended by themselves, in the order in which they ended."""
    classes: list[str] = []
    tenants: list[str] = []
    unended = unasked = 0

    def ended() -> Iterator[tuple[float, float, float]]:
        nonlocal unended, unasked
        for row, record in _records(path, rows):
            if record.get("odma") != "request":
                raise TraceError(f"{path}: row {row}: not a record of a decision log")
            if record.get("version") != 1:
                raise TraceError(f"{path}: row {row}: version {record.get('version')!r}, not 1")
            if record.get("end") not in ENDED_BY_ITSELF:
                unended += 1
            elif record.get("asked") is None:
                unasked += 1
            else:
                at, into, out = (
                    _value(path, row, name, _number, record.get(name)) for name in DECISION_COLUMNS
                )
                classes.append(str(record.get("request_class", "")))
                tenants.append(str(record.get("tenant") or ""))
                yield at, into, out

    seconds, inputs, outputs = _columns(ended())
    notes = [
        f"dropped {count} {'row' if count == 1 else 'rows'} {flaw}"
        for count, flaw in (
            (unended, "that did not end by themselves"),
            (unasked, "asked for before the service was restarted"),
        )
        if count
    ]
    if not classes:
        raise TraceError(f"{path}: no row can be replayed: {', '.join(notes) or 'there is none'}")
    return _Table(
        path.stem,
        DECISION_COLUMNS,
        seconds - seconds.min(),
        inputs,
        outputs,
        np.array(classes, object),
        notes=tuple(notes),
        tenant=np.array(tenants, object) if any(tenants) else None,
    )


def _ids(path: Path, row: int, value: Any) -> tuple[int, ...]:
    """Return a list of ids; none where a row has none."""
    ids = () if value is None else value
    if not isinstance(ids, list | tuple) or not all(type(i) is int for i in ids):
        raise TraceError(
            f"{path}: row {row}, column '{PREFIX_COLUMN}': not a list of whole numbers"
        )
    return tuple(ids)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    return float(value)


def _value(path: Path, row: int, name: str, parse: Callable[[Any], float], value: object) -> float:
    try:
        return parse(value)
    except (ValueError, OverflowError):
        kind = "an ISO time" if parse is _microseconds else "a number"
        flaw = "missing" if value is None else f"{value!r:.60} is not {kind}"
        raise TraceError(f"{path}: row {row}, column '{name}': {flaw}") from None


def _columns(rows: Iterator[tuple[float, float, float]]) -> NDArray[np.float64]:
    """Return three columns. A double holds every permitted token count exactly."""
    flat = array("d")
    for row in rows:
        flat.extend(row)
    return np.array(flat).reshape(-1, 3).T


def _place(path: Path, names: list[str], name: str) -> int:
    if names.count(name) != 1:
        times = "twice" if name in names else "missing"
        raise TraceError(f"{path}: column '{name}' is {times}; there are {', '.join(names):.120}")
    return names.index(name)


def _read_parquet(path: Path, rows: int | None) -> _Table:
    arrow, parquet = arrow_modules(path)
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if set(PROMPT_COLUMNS) <= set(schema.names):
                return _prompts_of(path, file.read(), rows)
            optional = {"t_seconds", *TEXT_COLUMNS, "output_recorded", PREFIX_COLUMN}
            optional &= set(schema.names)
            wanted = sorted({"input_tokens", "output_tokens"} | optional)
            for name in wanted:
                _place(path, schema.names, name)
            table = file.read(columns=wanted).slice(0, rows)
        prefixes = table.column(PREFIX_COLUMN).to_pylist() if PREFIX_COLUMN in wanted else None
        arrays = {name: table.column(name).to_numpy() for name in wanted if name != PREFIX_COLUMN}
    except arrow.ArrowException as error:
        raise TraceError(f"{path}: damaged parquet: {error}") from error

    def column(name: str, dtype_kinds: str, rule: str) -> Any:
        if name not in arrays:
            return None
        values = arrays[name]
        mixed = name in TEXT_COLUMNS and not all(isinstance(v, str) for v in values)
        if mixed or values.dtype.kind not in dtype_kinds:
            kind = schema.field(name).type
            raise TraceError(f"{path}: column '{name}' is {kind}, but must be {rule}")
        return values

    label = (schema.metadata or {}).get(LABEL_KEY, b"").decode("utf-8", errors="replace")
    return _Table(
        label or path.stem,
        PARQUET_COLUMNS,
        column("t_seconds", "iuf", "numbers"),
        column("input_tokens", "iuf", "numbers"),
        column("output_tokens", "iuf", "numbers"),
        column("request_class", "O", "text in every row"),
        column("output_recorded", "b", "true or false in every row"),
        prefixes and [_ids(path, row, ids) for row, ids in enumerate(prefixes, 1)],
        tenant=column("tenant", "O", "text in every row"),
    )


def _prompts_of(path: Path, table: Any, rows: int | None) -> _Table:
    """Return a set of prompts as a trace: rows in a fixed shuffle, each model a class.

    Rows with hidden reasoning are left out: their length is not what was generated. Where rows
    are told apart into splits, those are taken that no model of ours was trained on.
    """
    columns = {name: np.array(table.column(name).to_pylist()) for name in PROMPT_COLUMNS[1:]}
    keep = np.ones(len(table), np.bool_)
    if "reasoning_hidden" in table.column_names:
        keep &= ~np.array(table.column("reasoning_hidden").to_pylist(), np.bool_)
    if "split" in table.column_names:
        untrained = np.array(table.column("split").to_pylist(), object) == UNTRAINED
        keep &= untrained | ~untrained.any()
    order = np.random.default_rng(0).permutation(np.flatnonzero(keep))[:rows]
    table = table.take(order)
    models = table.column("model").to_pylist() if "model" in table.column_names else None
    classes = [str(model)[-LONGEST_CLASS_CHARACTERS:] for model in models or ()]
    prompts = [str(prompt) for prompt in table.column("prompt").to_pylist()]
    return _Table(
        path.stem,
        ("t_seconds", *PROMPT_COLUMNS[1:]),
        None,
        columns["prompt_tokens"][order],
        columns["output_tokens"][order],
        np.array(classes, object) if classes else None,
        texts=[
            prompt
            if len(prompt) <= 2 * END_CHARACTERS
            else prompt[:END_CHARACTERS] + prompt[-END_CHARACTERS:]
            for prompt in prompts
        ],
    )


def arrow_modules(path: Path) -> tuple[Any, Any]:
    """Return pyarrow and its parquet module. Raises TraceError without them."""
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise TraceError(
            f"{path}: parquet needs pyarrow; install it with: pip install 'odma-service[trace]'"
        ) from error


def _unusable(path: Path, error: OSError) -> TraceError:
    return TraceError(f"{path}: {error.strerror or error}")
