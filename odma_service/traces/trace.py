"""A trace: when each request arrived, how long its prompt was, how long its answer became.

A trace holds lengths and times, and texts only where its file is a set of prompts. One that
exists can be replayed as it is: it is in arrival order, and every request has a prompt and an
answer of at least one token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from odma_service._native import NAME_BYTES
from odma_service.errors import OdmaError

LARGEST_TOKENS = 2**31 - 1
LARGEST_SECONDS = 1e12
PREFIX_TOKENS = 512
NAME_RULE = f"up to {NAME_BYTES} bytes of UTF-8 without NUL: shorten it"

COLUMN_TYPES = {"t_seconds": np.float64, "input_tokens": np.int64, "output_tokens": np.int64}


class TraceError(OdmaError, ValueError):
    """A trace, or the file it should come from, breaks a rule.

    The message is one printable line, whatever the file held.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else " " for c in message))


class Waits(NamedTuple):
    """Whose answer each request waits for, because its prompt was made of it.

    after_row    that request, int64, an earlier one; -1: nobody's, it comes at its own time
    gap_seconds  how long after that answer's end it comes, float64
    session      whose request it is, int64, where the trace knows
    """

    after_row: NDArray[np.int64]
    gap_seconds: NDArray[np.float64]
    session: NDArray[np.int64] | None = None

    def part(self, rows: NDArray[np.int64]) -> Waits:
        """Return the waits of these rows in this order.

        Who waited for one that is left out waits for what that one waited for, after both gaps.
        """
        places = dict(zip(rows.tolist(), range(len(rows)), strict=True))
        after: list[int] = []
        gaps: list[float] = []
        for row, gap in zip(self.after_row.tolist(), self.gap_seconds.tolist(), strict=True):
            kept = row < 0 or row in places
            after.append(row if kept else after[row])
            gaps.append(gap if kept else gap + gaps[row])
        return Waits(
            np.array([places.get(after[row], -1) for row in rows.tolist()], np.int64),
            np.array(gaps, np.float64)[rows],
            None if self.session is None else self.session[rows],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in arrival order, one array element each.

    t_seconds      arrival, float64, ascending from 0 or later; all 0 where not known
    input_tokens   prompt length, int64, at least 1
    output_tokens  answer length, int64, at least 1; at a cap it means "at least"
    label          the trace's name, or "synthetic seed=..."
    request_class  each request's class, where the trace has classes
    tenant         whose each request is, where the trace knows
    texts          each prompt, where the file is a set of prompts
    prefix_ids     of each prompt, the ids of its blocks of block_tokens tokens from the start
                   on, where the trace has them: same id, same tokens up to there
    notes          what reading it dropped or changed, one sentence each
    waits          which requests wait for the answers of others, where the trace knows
    """

    t_seconds: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    label: str
    request_class: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    prefix_ids: tuple[tuple[int, ...], ...] | None = None
    texts: tuple[str, ...] | None = None
    tenant: tuple[str, ...] | None = None
    block_tokens: int = PREFIX_TOKENS
    waits: Waits | None = None

    def __post_init__(self) -> None:
        for name, dtype in COLUMN_TYPES.items():
            values = getattr(self, name)
            if values.dtype != dtype or values.shape != (len(self),):
                raise TraceError(
                    f"{self.label}: column '{name}' must be {len(self)} values of {dtype.__name__},"
                    f" not {values.dtype} of shape {values.shape}"
                )
        if len(self) == 0:
            raise TraceError(f"{self.label}: a trace has at least one request")
        for name in ("request_class", "tenant"):
            texts = getattr(self, name)
            if texts is not None and len(texts) != len(self):
                raise TraceError(
                    f"{self.label}: column '{name}' must be {len(self)} values, not {len(texts)}"
                )
            check_names(self.label, name, texts)
        if self.block_tokens < 1:
            raise TraceError(f"{self.label}: blocks have at least 1 token, not {self.block_tokens}")
        if self.prefix_ids is not None and len(self.prefix_ids) != len(self):
            raise TraceError(f"{self.label}: column 'hash_ids' must be {len(self)} lists")
        if self.waits is not None:
            if len(self.waits.after_row) != len(self):
                raise TraceError(f"{self.label}: column 'after_row' must be {len(self)} values")
            check_waits(self.label, self.waits)
        check_seconds(self.label, "t_seconds", self.t_seconds)
        check_tokens(self.label, "input_tokens", self.input_tokens, least=1)
        check_tokens(self.label, "output_tokens", self.output_tokens, least=1)
        late = np.flatnonzero(np.diff(self.t_seconds) < 0)
        if late.size:
            raise TraceError(
                f"{self.label}: row {late[0] + 2}, column 't_seconds': earlier than the row before"
            )

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.t_seconds)

    def head(self, rows: int) -> Trace:
        """Return the first `rows` requests, or all of them if there are fewer."""
        if rows < 1:
            raise TraceError(f"rows must be at least 1, not {rows}")
        return self.part(np.arange(min(rows, len(self))))

    def without_first(self, requests: int) -> Trace:
        """Return what comes after so many requests. Raises TraceError if there is none."""
        if requests >= len(self):
            raise TraceError(f"{self.label}: there are {len(self)} requests, none after {requests}")
        return self.part(np.arange(requests, len(self)))

    def part(self, rows: NDArray[np.int64], t_seconds: NDArray[np.float64] | None = None) -> Trace:
        """Return these rows in this order, which has to be in time unless times are given."""
        picked = rows.tolist()
        classes, prefixes, texts = self.request_class, self.prefix_ids, self.texts
        tenants = self.tenant
        return Trace(
            self.t_seconds[rows] if t_seconds is None else t_seconds,
            self.input_tokens[rows],
            self.output_tokens[rows],
            self.label,
            None if classes is None else tuple(classes[row] for row in picked),
            self.notes,
            None if prefixes is None else tuple(prefixes[row] for row in picked),
            None if texts is None else tuple(texts[row] for row in picked),
            None if tenants is None else tuple(tenants[row] for row in picked),
            self.block_tokens,
            None if self.waits is None else self.waits.part(rows),
        )


def check_seconds(source: str, column: str, values: NDArray[Any]) -> None:
    """Raise TraceError for the first value that is not a time from 0."""
    good = (values >= 0) & (values <= LARGEST_SECONDS)
    _refuse_first(source, column, values, good, f"a time from 0 to {LARGEST_SECONDS:g}")


def check_tokens(source: str, column: str, values: NDArray[Any], *, least: int) -> None:
    """Raise TraceError for the first value that is not a whole number of tokens from `least`."""
    good = (values >= least) & (values <= LARGEST_TOKENS) & (values == np.floor(values))
    rule = f"a whole number from {least} to {LARGEST_TOKENS}"
    _refuse_first(source, column, values, good, rule)


def check_waits(source: str, waits: Waits) -> None:
    """Raise TraceError for the first request that waits for none before it, or for no time."""
    after, rows = waits.after_row, np.arange(len(waits.after_row))
    rule = "a row before it, counted from 0, or -1 for none"
    _refuse_first(source, "after_row", after, (after >= -1) & (after < rows), rule)
    check_seconds(source, "gap_seconds", waits.gap_seconds)


def check_names(source: str, column: str, values: Iterable[str] | None) -> None:
    """Raise TraceError for the first class or tenant that no service takes for one."""
    for row, name in enumerate(() if values is None else values, 1):
        try:
            good = len(name.encode()) <= NAME_BYTES and "\0" not in name
        except UnicodeEncodeError:
            good = False
        if not good:
            raise TraceError(
                f"{source}: row {row}, column '{column}': {name!r:.60} is not {NAME_RULE}"
            )


def _refuse_first(
    source: str, column: str, values: NDArray[Any], good: NDArray[np.bool_], rule: str
) -> None:
    bad = np.flatnonzero(~good)
    if bad.size:
        row = bad[0]
        raise TraceError(
            f"{source}: row {row + 1}, column '{column}': {values[row].item()} is not {rule}"
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """How a length is spread over the requests, in tokens. Quantiles are interpolated."""

    mean: float
    p10: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: int


@dataclass(frozen=True, slots=True)
class Description:
    """A trace in numbers.

    waiting_requests wait for the answers of others, sessions is None where it is not known.
    Rate and variation are None where the arrivals span no time. An interarrival_cv of 1 is
    a Poisson process, above 1 is bursty. A share of outputs at the maximum that one request
    cannot explain is a cap, and the requests there are censored: they say "at least".
    """

    label: str
    requests: int
    requests_by_class: dict[str, int] | None
    waiting_requests: int
    sessions: int | None
    duration_seconds: float
    requests_per_second: float | None
    interarrival_cv: float | None
    input_tokens: Spread
    output_tokens: Spread
    total_tokens: Spread
    outputs_at_maximum: int
    outputs_at_maximum_share: float
    notes: tuple[str, ...]


def describe(trace: Trace) -> Description:
    """Return the trace's description in numbers."""
    gaps_seconds = np.diff(trace.t_seconds)
    duration_seconds = float(trace.t_seconds[-1] - trace.t_seconds[0])
    timed = duration_seconds > 1e-9  # less would make the rate overflow
    at_maximum = int(np.count_nonzero(trace.output_tokens == trace.output_tokens.max()))
    classes, waits = trace.request_class, trace.waits
    return Description(
        label=trace.label,
        requests=len(trace),
        requests_by_class=None if classes is None else dict(sorted(Counter(classes).items())),
        waiting_requests=0 if waits is None else int(np.count_nonzero(waits.after_row >= 0)),
        sessions=None if waits is None or waits.session is None else len(set(waits.session)),
        duration_seconds=duration_seconds,
        requests_per_second=len(gaps_seconds) / duration_seconds if timed else None,
        interarrival_cv=float(gaps_seconds.std() / gaps_seconds.mean()) if timed else None,
        input_tokens=_spread(trace.input_tokens),
        output_tokens=_spread(trace.output_tokens),
        total_tokens=_spread(trace.input_tokens + trace.output_tokens),
        outputs_at_maximum=at_maximum,
        outputs_at_maximum_share=at_maximum / len(trace),
        notes=trace.notes,
    )


def _spread(tokens: NDArray[np.int64]) -> Spread:
    p10, p50, p90, p95, p99 = np.quantile(tokens, (0.1, 0.5, 0.9, 0.95, 0.99)).tolist()
    return Spread(float(tokens.mean()), p10, p50, p90, p95, p99, int(tokens.max()))
