"""Reference rows: what another simulator found, and the same configuration played here.

A row names its configuration in one word: `[24x_]lpddr5-6400[_x16]_frfcfs_q32_refab_open`.
docs/guides/lpddr.md has the grammar.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from odma_service._native.lpddr import Estimator, Traffic
from odma_service.errors import InvalidError
from odma_service.lpddr.device import GRADE, LpddrDevice, read_grade

CYCLE_LEVEL = "ramulator"
LONGEST_SCORED_BYTES = 16 * 1024
WARMUP_SHARE = 19  # 5 % of all requests come before the counted ones
SEED = 12345
ESTIMATED_BYTES = 1 << 28
TIMED_RUNS = 1 << 20
LONGEST_TIMED_BYTES = 1 << 20
TIMES = 20

CONFIG = re.compile(
    r"(?:(?P<channels>[0-9]+)x_)?(?P<grade>[a-z][a-z0-9-]*)(?:_x16)?"
    r"_frfcfs(?P<rowhit>-rowhit)?_q(?P<entries>[0-9]+)_(?P<refresh>refab|refpb|noref)"
    r"(?P<wck>_wckalwayson)?_open"
)
REFRESH = {"refab": "all-bank", "refpb": "per-bank", "noref": "none"}
PATTERNS = ("sequential", "random_chunk", "random_block")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a reference file, and the line it came from."""

    where: str
    simulator: str
    config: str
    mapping: str
    sequential: bool
    chunk_bytes: int
    write_fraction: float
    interleave_bytes: int
    window: int
    descriptor_ck: int
    requests: int
    fraction_of_peak: float
    row_hit_rate: float | None
    of_device: bool

    def device(self) -> LpddrDevice:
        """Return the device that the configuration names. Raises InvalidError."""
        match = CONFIG.fullmatch(self.config)
        if not match:
            raise InvalidError(
                f"{self.where}: config",
                f"must read [24x_]{GRADE}[_x16]_frfcfs[-rowhit]_q32_refab|refpb|noref"
                f"[_wckalwayson]_open, not {self.config!r}",
            )
        entries = int(match["entries"])
        # The second simulator has no LPDDR5: its rows name an engine with the same timings.
        grade = match["grade"] if self.is_cycle_level else GRADE
        return LpddrDevice(
            read_grade(grade),
            channels=int(match["channels"] or 1),
            interleave_bytes=self.interleave_bytes,
            mapping=self.mapping,
        ).with_controller(
            scheduler="frfcfs-rowhit" if match["rowhit"] else "frfcfs",
            refresh=REFRESH[match["refresh"]],
            read_entries=entries,
            write_entries=entries,
            wck_always_on=match["wck"] is not None,
        )

    @property
    def is_cycle_level(self) -> bool:
        """Whether the simulator is the one that the model follows."""
        return self.simulator.startswith(CYCLE_LEVEL)

    @property
    def part(self) -> str:
        """Where the row is scored."""
        if not self.is_cycle_level:
            return "second_simulator"
        if self.of_device:
            return "device"
        scored = not self.sequential and self.chunk_bytes <= LONGEST_SCORED_BYTES
        return "channel" if scored else "other"


class Outcome(NamedTuple):
    """A row, and what our models say of it."""

    row: Row
    fraction_of_peak: float
    miss_rate: float
    requests: int
    clock_seconds: float
    estimated_fraction: float


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a reference file. Raises InvalidError that names line and column."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [_row(f"{path}:{i}", line) for i, line in enumerate(csv.DictReader(file), 2)]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidError(str(path), f"cannot be read: {error}") from None


def _row(where: str, line: dict[str, Any]) -> Row:
    def text(*names: str) -> str:
        for name in names:
            if line.get(name) is not None:
                return str(line[name]).strip()
        raise InvalidError(f"{where}: {names[0]}", "is missing")

    def number(*names: str, default: float | None = None) -> float:
        if default is not None and not any(line.get(name) for name in names):
            return default
        try:
            return float(text(*names))
        except ValueError:
            raise InvalidError(f"{where}: {names[0]}", f"a number, not {text(*names)!r}") from None

    pattern = text("pattern")
    if pattern not in PATTERNS:
        raise InvalidError(f"{where}: pattern", f"one of {', '.join(PATTERNS)}, not {pattern!r}")
    hit_rate = number("row_hit_rate", default=-1)
    return Row(
        where=where,
        simulator=text("simulator"),
        config=text("config"),
        mapping=text("mapping"),
        sequential=pattern == "sequential",
        chunk_bytes=int(number("chunk_bytes", "block_bytes")),
        write_fraction=number("write_fraction", default=0),
        interleave_bytes=int(number("channel_interleave_bytes", default=256)),
        window=int(number("window_blocks", default=0)),
        descriptor_ck=int(number("descriptor_serial_ck", default=0)),
        requests=int(number("requests")),
        fraction_of_peak=number("fraction_of_peak"),
        row_hit_rate=None if hit_rate < 0 else hit_rate,
        of_device="block_bytes" in line,
    )


def play(rows: Sequence[Row], clock: Callable[[], float]) -> Iterator[Outcome]:
    """Play every row on our models; `clock` tells the seconds that it takes."""
    estimators: dict[tuple[str, str, int, float], Estimator] = {}
    for row in rows:
        device = row.device()
        model = device.model()
        key = (row.config, row.mapping, row.interleave_bytes, row.write_fraction)
        if key not in estimators:
            estimators[key] = device.estimator(row.write_fraction)
        warmup = row.requests // WARMUP_SHARE
        stripe_bytes = device.channels * device.interleave_bytes
        # A stream keeps every channel busy: it never waits for its own window.
        traffic = Traffic(
            chunk_bytes=stripe_bytes if row.sequential else row.chunk_bytes,
            requests=row.requests,
            warmup_requests=warmup,
            sequential=row.sequential,
            write_fraction=row.write_fraction,
            window=0 if row.sequential else row.window,
            descriptor_ck=row.descriptor_ck,
            seed=SEED,
        )
        began = clock()
        played = model.play(traffic)
        seconds = clock() - began
        yield Outcome(
            row,
            played.fraction_of_peak,
            1 - played.row_hits / played.requests,
            row.requests + warmup,
            seconds,
            _estimated(row, device, estimators[key]),
        )


def _estimated(row: Row, device: LpddrDevice, estimator: Estimator) -> float:
    """Return the fraction of peak that the estimator expects for a row."""
    length = ESTIMATED_BYTES if row.sequential else row.chunk_bytes
    runs = np.zeros((max(64, ESTIMATED_BYTES // length // 64), 2), np.uint64)
    runs[:, 1] = length
    window = 0 if row.sequential else row.window
    price = estimator.price(runs, window, row.descriptor_ck * device.clock_seconds)
    moved = price.requests * device.grade.organisation["burst_bytes"]
    return moved / price.seconds / device.peak_bytes_per_second


def score(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the errors in parts: the scored channel rows on top."""
    parts: dict[str, list[Outcome]] = {
        part: [outcome for outcome in outcomes if outcome.row.part == part]
        for part in ("channel", "device", "other", "second_simulator")
    }
    judged = parts["channel"] + parts["device"]
    return {
        **_scores(parts["channel"]),
        "device": _scores(parts["device"]),
        "estimator": _errors(judged, [outcome.estimated_fraction for outcome in judged]),
        "other": {
            **_scores(parts["other"]),
            "second_simulator": _scores(parts["second_simulator"]),
        },
    }


def estimator_runs_per_second(clock: Callable[[], float]) -> float:
    """Return how many runs of mixed lengths an estimator prices a second."""
    estimator = LpddrDevice(read_grade()).estimator()
    runs = np.zeros((TIMED_RUNS, 2), np.uint64)
    runs[:, 1] = np.random.default_rng(SEED).integers(1, LONGEST_TIMED_BYTES, TIMED_RUNS)
    began = clock()
    for _ in range(TIMES):
        estimator.price(runs, 16, 1e-7)
    return TIMES * TIMED_RUNS / (clock() - began)


def _scores(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    scores = _errors(outcomes, [outcome.fraction_of_peak for outcome in outcomes])
    misses = [
        abs(outcome.miss_rate - (1 - outcome.row.row_hit_rate)) / (1 - outcome.row.row_hit_rate)
        for outcome in outcomes
        if outcome.row.row_hit_rate is not None and outcome.row.row_hit_rate < 1
    ]
    seconds = sum(outcome.clock_seconds for outcome in outcomes)
    scores["activation_error"] = fmean(misses) if misses else None
    scores["max_activation_error"] = max(misses, default=None)
    scores["requests_per_second"] = (
        sum(outcome.requests for outcome in outcomes) / seconds if seconds > 0 else None
    )
    return scores


def _errors(outcomes: Sequence[Outcome], fractions: Sequence[float]) -> dict[str, Any]:
    reference = [outcome.row.fraction_of_peak for outcome in outcomes]
    errors = [abs(ours / theirs - 1) for ours, theirs in zip(fractions, reference, strict=True)]
    return {
        "rows": len(errors),
        "mean_abs_rel_error": fmean(errors) if errors else None,
        "max_abs_rel_error": max(errors, default=None),
        "rank_correlation": spearman(fractions, reference),
    }


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return the rank correlation, ties by their mean rank; None if there is none.

    >>> spearman([1, 2, 3], [10, 30, 20])
    0.5
    """
    if len(a) < 2 or min(a) == max(a) or min(b) == max(b):
        return None
    return round(float(np.corrcoef(_ranks(a), _ranks(b))[0, 1]), 6)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = np.sort(np.asarray(values, float))
    return [
        float(np.searchsorted(ordered, value, "left") + np.searchsorted(ordered, value, "right"))
        for value in values
    ]
