"""Traces that hold texts and no lengths: LMCache's sessions, ShareGPT's conversations.

Their lengths are estimated, and a note says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from odma_service.traces.source import Source
from odma_service.traces.table import (
    ESTIMATED,
    Names,
    Table,
    columns,
    estimated_tokens,
    number,
    value_of,
)

LMCACHE: Names = ("timestamp", "input", "output")
SHAREGPT: Names = ("conversations", "conversations", "conversations")
ANSWERERS = {"gpt", "assistant", "chatgpt", "bing", "bard", "model"}
CLOCKS = ((1e9, 1.0), (1e12, 1e3), (1e15, 1e6), (1e18, 1e9))  # 1970 to 2286: from, per second
LARGEST_RELATIVE_SECONDS = 1e7


def read_lmcache(source: Source, rows: int | None) -> Table:
    """Read LMCache's agent sessions: calls with texts, at times since 1970 or from a start."""
    clocks: set[float] = set()

    def values() -> Iterator[tuple[float, float, float]]:
        for row, record in source.records(rows):
            at = value_of(source, row, LMCACHE[0], number, record.get(LMCACHE[0]))
            per_second = _per_second(source, row, at)
            clocks.add(per_second)
            if len(clocks) > 1:
                raise source.wrong(f"row {row}, column '{LMCACHE[0]}': {at:g} has another unit")
            into, out = (estimated_tokens(source, row, n, record.get(n)) for n in LMCACHE[1:])
            yield at / per_second, into, out

    seconds, inputs, outputs = columns(values())
    return Table(
        source.label, LMCACHE, seconds, inputs, outputs, notes=(ESTIMATED,), from_first=True
    )


def _per_second(source: Source, row: int, at: float) -> float:
    """Return the unit of a time: those since 1970 tell it, others are seconds."""
    if 0 <= at <= LARGEST_RELATIVE_SECONDS:
        return 1.0
    for least, per_second in CLOCKS:
        if least <= at < least * 10:
            return per_second
    raise source.wrong(
        f"row {row}, column '{LMCACHE[0]}': {at:g} is neither seconds from a start nor a time"
        " since 1970; write it in seconds"
    )


def read_sharegpt(source: Source, rows: int | None) -> Table:
    """Read ShareGPT's conversations: an answer is a request, its prompt all that was said before.

    `rows` counts conversations.
    """

    def values() -> Iterator[tuple[float, float, float]]:
        for row, record in source.records(rows):
            said = 0
            for speaker, text in _turns(source, row, record.get(SHAREGPT[0])):
                tokens = estimated_tokens(source, row, SHAREGPT[0], text)
                if speaker in ANSWERERS and said:
                    yield 0.0, said, tokens
                said += tokens

    _, inputs, outputs = columns(values())
    notes = (ESTIMATED, "an answer is a request: its prompt is its conversation up to there")
    return Table(source.label, SHAREGPT, None, inputs, outputs, notes=notes)


def _turns(source: Source, row: int, turns: Any) -> Iterator[tuple[str, Any]]:
    """Yield who speaks and what is said, under the names of ShareGPT or of chats."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise source.wrong(f"row {row}, column '{SHAREGPT[0]}': not a list of turns")
    for turn in turns:
        speaker = turn.get("from", turn.get("role"))
        if not isinstance(speaker, str):
            raise source.wrong(f"row {row}, column '{SHAREGPT[0]}': a turn without 'from'")
        yield speaker.lower(), turn.get("value", turn.get("content"))
