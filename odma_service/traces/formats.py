"""The formats of traces, in one table: a name, the marks it is known by, its reader.

Marks are columns of a CSV, or keys of the first objects of a JSON file. A file has the format
with most of its marks there. If two have as many, its user says which: formats differ in units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from odma_service.traces.from_csv import (
    AZURE,
    BURSTGPT,
    VIDUR,
    read_azure,
    read_burstgpt,
    read_vidur,
)
from odma_service.traces.from_jsonl import (
    DECISION,
    LENGTHS,
    read_aiperf,
    read_bailian,
    read_decisions,
    read_mooncake,
    read_offline,
)
from odma_service.traces.from_parquet import PARQUET, read_parquet
from odma_service.traces.from_results import RESULT, read_result
from odma_service.traces.from_texts import LMCACHE, SHAREGPT, read_lmcache, read_sharegpt
from odma_service.traces.source import Source
from odma_service.traces.table import Table

Reader = Callable[[Source, int | None], Table]
MARKED_ROWS = 100


@dataclass(frozen=True, slots=True)
class Format:
    """One format. Any of its sets of marks is enough; the first is what a user is shown."""

    name: str
    marks: tuple[frozenset[str], ...]
    reader: Reader
    is_csv: bool = False


def _marks(*alternatives: tuple[str, ...]) -> tuple[frozenset[str], ...]:
    return tuple(map(frozenset, alternatives))


SGLANG_MARK = "total_output_tokens_retokenized"
TOTALS = ("request_throughput", "total_input_tokens")
FORMATS = {
    each.name: each
    for each in (
        Format("parquet", (), read_parquet),
        Format("azure", _marks(AZURE), read_azure, is_csv=True),
        Format("burstgpt", _marks((*BURSTGPT, "Model")), read_burstgpt, is_csv=True),
        Format("vidur", _marks(VIDUR, VIDUR[1:]), read_vidur, is_csv=True),
        Format("mooncake", _marks(LENGTHS), read_mooncake),
        Format("bailian", _marks(("chat_id", *LENGTHS)), read_bailian),
        Format(
            "aiperf",
            _marks(
                ("session_id", *LENGTHS),
                ("delay", *LENGTHS),
                ("session_id", *LENGTHS[1:]),
                ("text_input", LENGTHS[2]),
                ("messages", LENGTHS[2]),
            ),
            read_aiperf,
        ),
        Format(
            "servegen-offline",
            _marks(("request_id", "type", *LENGTHS[1:])),
            read_offline,
        ),
        Format("lmcache", _marks(("session_id", *LMCACHE)), read_lmcache),
        Format("sharegpt", _marks(SHAREGPT), read_sharegpt),
        Format("vllm", _marks(RESULT[1:], TOTALS), read_result),
        Format(
            "sglang",
            _marks((*RESULT[1:], SGLANG_MARK), (*TOTALS, SGLANG_MARK)),
            read_result,
        ),
        Format("decision-log", _marks(("odma", *DECISION), ("odma",)), read_decisions),
    )
}
KNOWN = "; ".join(
    f"{name} ({', '.join(PARQUET if not each.marks else sorted(each.marks[0]))})"
    for name, each in FORMATS.items()
)


def named(source: Source, name: str) -> Format:
    """Return the format of a name. Raises TraceError if there is none such."""
    if name not in FORMATS:
        raise source.wrong(f"no format is named {name!r}; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def recognised(source: Source) -> Format:
    """Return the format whose marks a source bears. Raises TraceError if that is in doubt."""
    head = source.head(4096)
    if head.startswith(b"PAR1"):
        return FORMATS["parquet"]
    start = head.decode("utf-8-sig", errors="replace").lstrip()
    if not start:
        raise source.wrong("the file is empty")
    is_csv = start[0] not in "{["
    found = _header(source) if is_csv else _keys(source)
    formats = [each for each in FORMATS.values() if each.marks and each.is_csv == is_csv]
    for score in (_whole, _part):
        scores = {each.name: score(each, found) for each in formats}
        best = [name for name, value in scores.items() if value and value == max(scores.values())]
        if len(best) == 1:
            return FORMATS[best[0]]
        if best:
            raise source.wrong(f"it may be {' or '.join(best)}: say which with --format")
    raise source.wrong(f"not a trace; known are {KNOWN}")


def _whole(each: Format, found: set[str]) -> int:
    return max((len(marks) for marks in each.marks if marks <= found), default=0)


def _part(each: Format, found: set[str]) -> int:
    """Count what is there of a format that lacks some: its reader says what is missing."""
    return max(len(marks & found) for marks in each.marks)


def _header(source: Source) -> set[str]:
    return {name.strip() for name in next(source.cells(), [])}


def _keys(source: Source) -> set[str]:
    values = islice(source.values(), MARKED_ROWS)
    return {key for value in values if isinstance(value, dict) for key in value}
