"""Reports: a comparison as files, and what a reader of its table should not overlook."""

from __future__ import annotations

import csv
import json
from base64 import b64encode
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from odma_service.replay.compare import Comparison, as_object
from odma_service.replay.loop import History
from odma_service.replay.policies import IDEAL, IDEAL_BEST, REUSE, REUSE_IDEAL
from odma_service.replay.prices import PICOSECONDS

CURE = "pip install 'odma-service[plots]'"

TEMPLATE = Path(__file__).with_name("report.html.j2")
Cell = Callable[[str, dict[str, Any]], str]
COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("policy", lambda name, _: name),
    ("tokens/s", lambda _, row: with_interval(row["tokens_per_s"], row["tokens_per_s_ci95"], 1)),
    (
        "of ideal",
        lambda _, row: with_interval(row["over_ideal_paging"], row["over_ideal_paging_ci95"], 3),
    ),
    ("running", lambda _, row: f"{row['mean_running']:.1f}"),
    ("written/cap", lambda _, row: f"{row['utilisation_written_over_capacity']:.1%}"),
    ("written/res", lambda _, row: f"{row['utilisation_written_over_reserved']:.1%}"),
    ("preempted", lambda _, row: f"{row['preemptions']:,.0f}"),
    ("recomputed", lambda _, row: f"{row['recomputed_tokens']:,.0f}"),
    ("reused", lambda _, row: f"{row['reused_tokens'] / max(row['prompt_tokens'], 1):.1%}"),
    ("copies", lambda _, row: f"{row['copies']:,.0f}"),
    ("copy time", lambda _, row: f"{row['copy_share_of_time']:.2%}"),
    ("TTFT p50/p99 s", lambda _, row: f"{row['ttft_p50_s']:.2f} / {row['ttft_p99_s']:.1f}"),
    ("TPOT p50/p99 ms", lambda _, row: _milliseconds(row["tpot_p50_s"], row["tpot_p99_s"])),
    ("safety hits", lambda _, row: f"{row['safety_hits']:,.0f}"),
    ("recal.", lambda _, row: f"{row['recalibrations']:,.0f}"),
)
"""Of a comparison's table: a heading, and the cell of a policy."""


def _milliseconds(p50_s: float | None, p99_s: float | None) -> str:
    """Return two times; answers of one token have none between tokens."""
    if p50_s is None or p99_s is None:
        return "-"
    return f"{p50_s * 1e3:.0f} / {p99_s * 1e3:.0f}"


def with_interval(value: float, half: float | None, digits: int) -> str:
    """Return a number with half of its confidence interval, if there is one."""
    shown = f"{value:,.{digits}f}"
    return shown if half is None else f"{shown} ± {half:.{digits}f}"


def remarks(comparison: Comparison) -> list[str]:
    """Return sentences on how ours compare with the rivals of this comparison."""
    rates = {name: sum(comparison.rates(name)) for name in comparison.outcomes}
    said = []
    for ours in ("elastic", "elastic-streams", "odma"):
        if ours not in rates:
            continue
        ahead = [
            f"{name} by {rates[name] / rates[ours] - 1:.1%}"
            for name in rates
            if name.startswith("paged-") and rates[name] > rates[ours]
        ]
        if ahead:
            said.append(f"ahead of {ours} at the bandwidth emulated for pages: {', '.join(ahead)}")
    if "odma" in rates and "oracle" in rates:
        ratio = comparison.ratio("odma", "oracle").mean
        said.append(f"odma gives {ratio:.3f} of exact lengths reserved (oracle, no moves)")
    for ideal in (IDEAL, IDEAL_BEST):
        if "elastic" in rates and ideal in rates:
            ratio = comparison.ratio("elastic", ideal).mean
            said.append(f"elastic gives {ratio:.3f} of {ideal}")
    if REUSE in rates and REUSE_IDEAL in rates:
        ratio = comparison.ratio(REUSE, REUSE_IDEAL).mean
        said.append(f"{REUSE} gives {ratio:.3f} of {REUSE_IDEAL}")
    return said


def write_report(compared: Sequence[Comparison], directory: Path) -> list[str]:
    """Write report.json and report.csv, plots as PNG and report.html, which needs nothing else.

    Return what could not be written, for want of matplotlib or jinja2.
    """
    directory.mkdir(parents=True, exist_ok=True)
    objects = [as_object(comparison) for comparison in compared]
    (directory / "report.json").write_text(json.dumps(objects, indent=1, allow_nan=False) + "\n")
    rows = [
        {"trace": facts["trace"], "load_class": facts["load_class"], "policy": name, **figures}
        for facts in objects
        for name, figures in facts["policies"].items()
    ]
    for row in rows:
        row.pop("tenants", None)  # those of all traces have the same columns
    with (directory / "report.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    missing = []
    pictures = [b""] * len(compared)
    try:
        plots: Any = import_module("matplotlib.pyplot")
    except ImportError:
        missing.append(f"no plots without matplotlib: {CURE}")
    else:
        for number, comparison in enumerate(compared):
            path = directory / f"{number:02d}-{_file_name(comparison.label)}.png"
            _plot(plots, comparison, path)
            pictures[number] = path.read_bytes()
    try:
        template = import_module("jinja2").Template(TEMPLATE.read_text(), autoescape=True)
    except ImportError:
        return [*missing, f"no report.html without jinja2: {CURE}"]
    loads = [
        {"facts": facts, "remarks": remarks(comparison), "picture": b64encode(picture).decode()}
        for facts, comparison, picture in zip(objects, compared, pictures, strict=True)
    ]
    (directory / "report.html").write_text(template.render(loads=loads, columns=COLUMNS))
    return missing


def _plot(plots: Any, comparison: Comparison, path: Path) -> None:
    """Draw pictures of the first seed."""
    figure, axes = plots.subplots(2, 3, figsize=(17, 8))
    (written, share, limits), (where, ttft, tpot) = axes
    capacity = comparison.setting.limits.capacity_tokens
    for name, outcomes in comparison.outcomes.items():
        outcome = outcomes[0]
        written.plot(*_written_over_time(outcome.history, capacity), label=name, linewidth=0.8)
        if outcome.events:
            steps = [event.step for event in outcome.events]
            shares = [event.safety_share for event in outcome.events]
            share.step(steps, shares, where="post", label=name)
        if name == "odma" and outcome.events:
            most = max(len(event.limits_tokens) for event in outcome.events)
            ladder = [
                (*event.limits_tokens, *[None] * (most - len(event.limits_tokens)))
                for event in outcome.events
            ]
            limits.step(steps, ladder, where="post", color="tab:green", linewidth=0.8)
        measures = outcome.measures
        assert measures is not None
        in_use = measures.utilisation_written_over_capacity
        reserved = in_use / measures.utilisation_written_over_reserved
        where.barh(name, in_use, color="tab:blue")
        where.barh(name, reserved - in_use, left=in_use, color="tab:orange")
        history = outcome.history
        _distribution(ttft, history.arrived_ps, history.first_ps, name)
        _distribution(tpot, history.first_ps, history.finished_ps, name)
    written.set(title="written / capacity over time", xlabel="s", ylim=(0, 1))
    share.set(title="safety share", xlabel="decode step")
    limits.set(title="bucket limits of odma, tokens", xlabel="decode step", yscale="log")
    where.set(title="memory written, and reserved beyond it (window)", xlim=(0, 1))
    ttft.set(title="time to first token, share of requests", xlabel="s")
    tpot.set(title="first token to last, share of requests", xlabel="s")
    for axis in (ttft, tpot):
        axis.set_xscale("log" if axis.dataLim.x1 > 0 else "linear")  # answers of one token: all 0
    for axis in (written, share, ttft, tpot):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.suptitle(f"{comparison.label}: {comparison.load_class.name}")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plots.close(figure)


def _written_over_time(history: History, capacity: int) -> tuple[list[float], list[float]]:
    sums = history.sums
    every = max(len(sums) // 200, 1)
    pairs = zip(sums[:-every:every], sums[every::every], strict=False)
    points = [(a, b) for a, b in pairs if b.now_ps > a.now_ps]
    return [b.now_ps / PICOSECONDS for _, b in points], [
        (b.written_token_ps - a.written_token_ps) / (b.now_ps - a.now_ps) / capacity
        for a, b in points
    ]


def _distribution(axis: Any, begins: Sequence[int], ends: Sequence[int], name: str) -> None:
    times = sorted((end - begin) / PICOSECONDS for begin, end in zip(begins, ends, strict=True))
    axis.plot(times, [i / len(times) for i in range(len(times))], label=name)


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label)[:60]
