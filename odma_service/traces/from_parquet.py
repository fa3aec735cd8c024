"""Parquet: our own traces, and sets of prompts. It needs pyarrow, an optional extra."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from odma_service._native import NAME_BYTES
from odma_service.traces.source import Source, unusable
from odma_service.traces.table import PREFIX_COLUMN, Names, Table, ids_of, place
from odma_service.traces.trace import PREFIX_TOKENS, Trace, TraceError, Waits

PARQUET: Names = ("t_seconds", "input_tokens", "output_tokens")
TEXT_COLUMNS = ("request_class", "tenant")
WAIT_COLUMNS = ("after_row", "gap_seconds")
SESSION = "session"
PROMPTS: Names = ("prompt", "prompt_tokens", "output_tokens")
UNTRAINED = "val"
END_CHARACTERS = 1_024
LABEL_KEY = b"odma.label"
BLOCK_KEY = b"hash_block_tokens"


def write_trace(trace: Trace, path: str | Path) -> None:
    """Write the trace and its label as parquet. Raises TraceError.

    The name must end in .parquet: swapped arguments then overwrite no CSV or JSONL.
    """
    path = Path(path)
    if path.suffix != ".parquet":
        raise TraceError(f"{path}: traces are written as parquet, so name the file *.parquet")
    arrow, parquet = arrow_modules(path)
    columns: dict[str, Any] = {name: getattr(trace, name) for name in PARQUET}
    for name in TEXT_COLUMNS:
        if getattr(trace, name) is not None:
            columns[name] = arrow.array(getattr(trace, name), type=arrow.string())
    if trace.waits is not None:
        columns |= {name: getattr(trace.waits, name) for name in WAIT_COLUMNS}
        if trace.waits.session is not None:
            columns[SESSION] = trace.waits.session
    metadata = {LABEL_KEY: trace.label.encode("utf-8", errors="replace")}
    if trace.prefix_ids is not None:
        columns[PREFIX_COLUMN] = arrow.array(trace.prefix_ids, type=arrow.list_(arrow.int64()))
        metadata[BLOCK_KEY] = str(trace.block_tokens).encode()
    try:
        parquet.write_table(arrow.table(columns, metadata=metadata), path)
    except OSError as error:
        raise unusable(path, error) from error


def read_parquet(source: Source, rows: int | None) -> Table:
    """Read a trace, or a set of prompts if it has their columns."""
    arrow, parquet = arrow_modules(source.path)
    source.file.seek(0)
    try:
        with parquet.ParquetFile(source.file) as file:
            names = file.schema_arrow.names
            if set(PROMPTS) <= set(names):
                return _prompts_of(_Columns(source, file.read()), rows)
            optional = {"t_seconds", *TEXT_COLUMNS, "output_recorded", PREFIX_COLUMN}
            required = {"input_tokens", "output_tokens"}
            if WAIT_COLUMNS[0] in names:
                required |= set(WAIT_COLUMNS)
                optional.add(SESSION)
            wanted = sorted(required | optional & set(names))
            for name in wanted:
                place(source, names, name)
            return _trace_of(_Columns(source, file.read(columns=wanted).slice(0, rows)))
    except (arrow.ArrowException, OverflowError, UnicodeDecodeError) as error:
        raise source.wrong(f"damaged parquet: {error}") from error


class _Columns:
    """The columns of a file in memory, by name."""

    def __init__(self, source: Source, table: Any) -> None:
        self.source = source
        self.table = table

    def lists(self, name: str) -> list[Any] | None:
        """Return a column as it is; None if there is none such."""
        has = name in self.table.column_names
        return self.table.column(name).to_pylist() if has else None

    def array(self, name: str, dtype_kinds: str, rule: str) -> Any:
        """Return a column whose type has one of these kinds; None if there is none such."""
        if name not in self.table.column_names:
            return None
        values = self.table.column(name).to_numpy()
        mixed = "O" in dtype_kinds and not all(isinstance(v, str) for v in values)
        if mixed or values.dtype.kind not in dtype_kinds:
            kind = self.table.schema.field(name).type
            raise self.source.wrong(f"column '{name}' is {kind}, but must be {rule}")
        return values

    def numbers(self, name: str) -> Any:
        return self.array(name, "iuf", "numbers")

    def whole(self, name: str) -> Any:
        return self.array(name, "iu", "whole numbers")

    def texts(self, name: str) -> Any:
        return self.array(name, "O", "text in every row")

    def flags(self, name: str) -> Any:
        return self.array(name, "b", "true or false in every row")


def _trace_of(columns: _Columns) -> Table:
    source = columns.source
    metadata = columns.table.schema.metadata or {}
    prefixes = columns.lists(PREFIX_COLUMN)
    block = metadata.get(BLOCK_KEY, str(PREFIX_TOKENS).encode())
    if prefixes and not (block.isdigit() and 0 < int(block[:10]) == int(block[:11])):
        raise source.wrong(f"metadata '{BLOCK_KEY.decode()}': {block!r:.60} is no number of tokens")
    after = columns.whole(WAIT_COLUMNS[0])
    return Table(
        metadata.get(LABEL_KEY, b"").decode("utf-8", errors="replace") or source.label,
        PARQUET,
        columns.numbers("t_seconds"),
        columns.numbers("input_tokens"),
        columns.numbers("output_tokens"),
        columns.texts("request_class"),
        columns.flags("output_recorded"),
        prefixes and [ids_of(source, row, ids) for row, ids in enumerate(prefixes, 1)],
        tenant=columns.texts("tenant"),
        block_tokens=int(block) if prefixes else PREFIX_TOKENS,
        waits=None
        if after is None
        else Waits(after, columns.numbers(WAIT_COLUMNS[1]), columns.whole(SESSION)),
    )


def _prompts_of(columns: _Columns, rows: int | None) -> Table:
    """Return a set of prompts as a trace: rows in a fixed shuffle, each model a class.

    Rows with hidden reasoning are left out: their length is not what was generated. Where rows
    are told apart into splits, those are taken that no model of ours was trained on.
    """
    keep = np.ones(len(columns.table), np.bool_)
    hidden, split = columns.lists("reasoning_hidden"), columns.lists("split")
    if hidden is not None:
        keep &= ~np.array(hidden, np.bool_)
    if split is not None:
        untrained = np.array(split, object) == UNTRAINED
        keep &= untrained | ~untrained.any()
    order = np.random.default_rng(0).permutation(np.flatnonzero(keep))[:rows]
    inputs, outputs = (columns.numbers(name)[order] for name in PROMPTS[1:])
    columns = _Columns(columns.source, columns.table.take(order))
    classes = [_end_of_name(str(model)) for model in columns.lists("model") or ()]
    return Table(
        columns.source.label,
        ("t_seconds", *PROMPTS[1:]),
        None,
        inputs,
        outputs,
        np.array(classes, object) if classes else None,
        texts=[_ends(str(prompt)) for prompt in columns.lists("prompt") or ()],
    )


def _end_of_name(name: str) -> str:
    return name.encode()[-NAME_BYTES:].decode(errors="ignore")


def _ends(prompt: str) -> str:
    """Return the beginning and the end of a long text, which is all that a predictor sees."""
    if len(prompt) <= 2 * END_CHARACTERS:
        return prompt
    return prompt[:END_CHARACTERS] + prompt[-END_CHARACTERS:]


def arrow_modules(path: Path) -> tuple[Any, Any]:
    """Return pyarrow and its parquet module. Raises TraceError without them."""
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise TraceError(
            f"{path}: parquet needs pyarrow; install it with: pip install 'odma-service[trace]'"
        ) from error
