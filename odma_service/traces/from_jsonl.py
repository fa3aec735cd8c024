"""Traces with an object on each line that tells lengths: Mooncake's, Bailian's, AIPerf's, ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from odma_service.traces.source import Source
from odma_service.traces.table import (
    ESTIMATED,
    PREFIX_COLUMN,
    Names,
    Table,
    columns,
    dropped,
    estimated_tokens,
    ids_of,
    number,
    value_of,
    values_of,
)

LENGTHS: Names = ("timestamp", "input_length", "output_length")
DECISION: Names = ("asked", "prompt_tokens", "output_tokens")
ENDED_BY_ITSELF = ("FINISHED", "HIT_LIMIT")
BAILIAN_BLOCK_TOKENS = 16
OF_AIPERF = ("session_id", "delay")
OF_BAILIAN = ("chat_id", "parent_chat_id")


def read_mooncake(source: Source, rows: int | None) -> Table:
    """Read Mooncake's traces: milliseconds, prefix ids of blocks of 512 tokens."""
    return _lengths(source, rows, OF_AIPERF + OF_BAILIAN, per_second=1e3)


def read_bailian(source: Source, rows: int | None) -> Table:
    """Read Bailian's (Qwen's) traces: seconds, prefix ids of blocks of 16 tokens."""
    return _lengths(source, rows, OF_AIPERF, from_first=True, block_tokens=BAILIAN_BLOCK_TOKENS)


def _lengths(source: Source, rows: int | None, foreign: tuple[str, ...], **units: Any) -> Table:
    prefixes: list[tuple[int, ...]] = []

    def values() -> Iterator[tuple[float, float, float]]:
        for row, record in source.records(rows):
            _refuse_foreign(source, row, record, foreign)
            at, into, out = values_of(source, row, LENGTHS, record)
            if "per_second" in units and not source.named and at % 1 > 0:
                raise source.wrong(
                    f"row {row}, column '{LENGTHS[0]}': {at:g} may be milliseconds or seconds;"
                    " say which: --format mooncake or --format bailian"
                )
            prefixes.append(ids_of(source, row, record.get(PREFIX_COLUMN)))
            yield at, into, out

    times, inputs, outputs = columns(values())
    ids = prefixes if any(prefixes) else None
    return Table(source.label, LENGTHS, times, inputs, outputs, prefix_ids=ids, **units)


def _refuse_foreign(
    source: Source, row: int, record: dict[str, Any], foreign: tuple[str, ...]
) -> None:
    """Refuse keys that another format gives another meaning, unless the format was named."""
    found = () if source.named else tuple(name for name in foreign if name in record)
    if found:
        other = "aiperf" if found[0] in OF_AIPERF else "bailian"
        raise source.wrong(
            f"row {row}, column '{found[0]}': rows before it have none; if the trace is one of"
            f" {other}, say so: --format {other}"
        )


def read_offline(source: Source, rows: int | None) -> Table:
    """Read ServeGen's offline batches: lengths and blocks of 16 tokens, no times."""
    names = ("request_id", *LENGTHS[1:])
    prefixes: list[tuple[int, ...]] = []

    def values() -> Iterator[tuple[float, float, float]]:
        for row, record in source.records(rows):
            prefixes.append(ids_of(source, row, record.get(PREFIX_COLUMN)))
            yield values_of(source, row, names, record)

    _, inputs, outputs = columns(values())
    ids = prefixes if any(prefixes) else None
    return Table(
        source.label,
        names,
        None,
        inputs,
        outputs,
        prefix_ids=ids,
        block_tokens=BAILIAN_BLOCK_TOKENS,
    )


class _Session:
    """What came before a turn: when it was sent, in milliseconds, and the tokens said by then."""

    def __init__(self) -> None:
        self.sent = 0.0
        self.said = 0.0


def read_aiperf(source: Source, rows: int | None) -> Table:
    """Read AIPerf's traces: milliseconds; turns of sessions follow each other by delays.

    A turn's lengths are those of its own words, and what its session said before comes on top,
    as AIPerf sends it; `messages` are the whole prompt.
    """
    sessions: dict[str, _Session] = {}
    prefixes: list[tuple[int, ...]] = []
    notes: set[str] = set()
    timed = False
    untimed = 0  # the last row that begins something at an unknown time

    def values() -> Iterator[tuple[float, float, float]]:
        nonlocal timed, untimed
        for row, record in source.records(rows):
            _refuse_foreign(source, row, record, OF_BAILIAN)
            name = record.get("session_id")
            first = name is None or str(name) not in sessions
            session = _Session() if first else sessions[str(name)]
            if name is not None:
                sessions[str(name)] = session
            if record.get(LENGTHS[0]) is not None:
                timed = True
            elif first:
                untimed = row
            session.sent = _sent(source, row, record, session, first=first, notes=notes)
            into = session.said + _own_tokens(source, row, record, notes)
            if "messages" in record:
                into -= session.said
            elif session.said:
                notes.add("a turn's prompt is all that its session said before, and its own words")
            out = value_of(source, row, LENGTHS[2], number, record.get(LENGTHS[2]))
            session.said = into + out
            ids = ids_of(source, row, record.get(PREFIX_COLUMN))
            prefixes.append(ids if first else ())
            yield session.sent, into, out

    times, inputs, outputs = columns(values())
    if timed and untimed:
        raise source.wrong(
            f"row {untimed}, column '{LENGTHS[0]}': missing; a session's first turn needs one"
        )
    if not timed and sessions:
        notes.add("no timestamps: every session begins at 0")
    return Table(
        source.label,
        LENGTHS,
        times if timed or sessions else None,
        inputs,
        outputs,
        prefix_ids=prefixes if any(prefixes) else None,
        notes=tuple(sorted(notes)),
        per_second=1e3,
        from_first=True,
    )


def _sent(
    source: Source,
    row: int,
    record: dict[str, Any],
    session: _Session,
    *,
    first: bool,
    notes: set[str],
) -> float:
    """Return when a turn is sent: at its timestamp, or its delay after the turn before it."""
    if record.get(LENGTHS[0]) is not None:
        return value_of(source, row, LENGTHS[0], number, record[LENGTHS[0]])
    if record.get("delay") is None:
        return session.sent
    if not first:
        notes.add("a delay counts from the turn before: when that was answered is not known")
    return session.sent + value_of(source, row, "delay", _wait, record["delay"])


def _wait(value: object) -> float:
    wait = number(value)
    if not wait >= 0:
        raise ValueError("a number")
    return wait


def _own_tokens(source: Source, row: int, record: dict[str, Any], notes: set[str]) -> float:
    """Return the length of a turn's own words, which are counted or written out."""
    if "messages" not in record and "text_input" not in record:
        return value_of(source, row, LENGTHS[1], number, record.get(LENGTHS[1]))
    notes.add(ESTIMATED)
    if "text_input" in record:
        return estimated_tokens(source, row, "text_input", record["text_input"])
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise source.wrong(f"row {row}, column 'messages': not a list of messages")
    return sum(
        estimated_tokens(source, row, "messages", text)
        for message in messages
        for text in _texts(message)
    )


def _texts(message: Any) -> list[Any]:
    """Return the texts of a message of a chat: its content, or the texts among its parts."""
    content = message.get("content", "") if isinstance(message, dict) else message
    if isinstance(content, list):
        return [part.get("text", "") for part in content if isinstance(part, dict)]
    return ["" if content is None else content]


def read_decisions(source: Source, rows: int | None) -> Table:
    """Return the requests that ended by themselves, in the order in which they ended."""
    classes: list[str] = []
    tenants: list[str] = []
    unended = unasked = 0

    def ended() -> Iterator[tuple[float, float, float]]:
        nonlocal unended, unasked
        for row, record in source.records(rows):
            if record.get("odma") != "request":
                raise source.wrong(f"row {row}: not a record of a decision log")
            if record.get("version") != 1:
                raise source.wrong(f"row {row}: version {record.get('version')!r:.60}, not 1")
            if record.get("end") not in ENDED_BY_ITSELF:
                unended += 1
            elif record.get("asked") is None:
                unasked += 1
            else:
                classes.append(str(record.get("request_class", "")))
                tenants.append(str(record.get("tenant") or ""))
                yield values_of(source, row, DECISION, record)

    seconds, inputs, outputs = columns(ended())
    notes = dropped(unended, "that did not end by themselves")
    notes += dropped(unasked, "asked for before the service was restarted")
    if not classes:
        raise source.wrong(f"no row can be replayed: {', '.join(notes) or 'there is none'}")
    return Table(
        source.label,
        DECISION,
        seconds,
        inputs,
        outputs,
        np.array(classes, object),
        notes=tuple(notes),
        tenant=np.array(tenants, object) if any(tenants) else None,
        from_first=True,
    )
