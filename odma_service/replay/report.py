"""Reports: a comparison as files, and what a reader of its table should not overlook."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from odma_service.replay.compare import Comparison, as_object
from odma_service.replay.policies import IDEAL, IDEAL_BEST
from odma_service.replay.prices import PICOSECONDS


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
    return said


def write_report(compared: Sequence[Comparison], directory: Path) -> None:
    """Write report.json, report.csv and, where matplotlib is installed, plots as PNG."""
    directory.mkdir(parents=True, exist_ok=True)
    objects = [as_object(comparison) for comparison in compared]
    (directory / "report.json").write_text(json.dumps(objects, indent=1) + "\n")
    rows = [
        {"trace": facts["trace"], "load_class": facts["load_class"], "policy": name, **figures}
        for facts in objects
        for name, figures in facts["policies"].items()
    ]
    with (directory / "report.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    try:
        plots: Any = import_module("matplotlib.pyplot")
    except ImportError:
        return
    for number, comparison in enumerate(compared):
        _plot(plots, comparison, directory / f"{number:02d}-{_file_name(comparison.label)}.png")


def _plot(plots: Any, comparison: Comparison, path: Path) -> None:
    """Draw four pictures of the first seed."""
    figure, axes = plots.subplots(2, 2, figsize=(13, 8))
    capacity = comparison.setting.limits.capacity_tokens
    (written, policy), (where, latency) = axes
    shares: dict[str, tuple[float, float]] = {}
    for name, outcomes in comparison.outcomes.items():
        outcome = outcomes[0]
        sums = outcome.history.sums
        every = max(len(sums) // 200, 1)
        points = list(zip(sums[:-every:every], sums[every::every], strict=False))
        points = [(a, b) for a, b in points if b.now_ps > a.now_ps]
        seconds = [b.now_ps / PICOSECONDS for _, b in points]
        used = [
            (b.written_token_ps - a.written_token_ps) / (b.now_ps - a.now_ps) / capacity
            for a, b in points
        ]
        written.plot(seconds, used, label=name, linewidth=0.8)
        if outcome.events:
            steps = [event.step for event in outcome.events]
            policy.step(
                steps,
                [event.safety_share for event in outcome.events],
                where="post",
                label=f"{name}: safety share",
            )
        measures = outcome.measures
        assert measures is not None
        in_use = measures.utilisation_written_over_capacity
        shares[name] = (in_use, in_use / measures.utilisation_written_over_reserved - in_use)
        times = sorted(
            (first - arrived) / PICOSECONDS
            for first, arrived in zip(
                outcome.history.first_ps, outcome.history.arrived_ps, strict=True
            )
        )
        latency.plot(times, [i / len(times) for i in range(len(times))], label=name)
    names = list(shares)
    where.barh(names, [shares[name][0] for name in names], label="written")
    where.barh(
        names,
        [shares[name][1] for name in names],
        left=[shares[name][0] for name in names],
        label="reserved, not written",
    )
    where.set(title="where memory goes (window)", xlim=(0, 1))
    written.set(title="written / capacity over time", xlabel="s", ylim=(0, 1))
    policy.set(title="safety share over decode steps", xlabel="step")
    latency.set(title="time to first token", xlabel="s", xscale="log")
    for axis in (written, policy, where, latency):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.suptitle(f"{comparison.label}: {comparison.load_class.name}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plots.close(figure)


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label)[:60]
