"""`odma bench replay`: how fast the judge is, and a recalibration."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from odma_service import replay, traces
from odma_service._native import optimal_limits
from odma_service.cli.options import AsJson
from odma_service.cli.output import show
from odma_service.replay.workplace import workplace

RECALIBRATION_BINS = 512
RECALIBRATION_LIMITS = 16


app = typer.Typer()


@app.command()
def command(
    trace: Annotated[Path, typer.Option(help="Trace to serve.")] = Path(
        "../shared/data/traces/mooncake_conversation_first2thirds.parquet"
    ),
    policy: Annotated[str, typer.Option(help=f"One of {', '.join(replay.NAMES)}.")] = "elastic",
    rows: Annotated[int | None, typer.Option(min=1, help="First rows of the file only.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Runs, of which the best counts.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Measure requests a minute on one core, growth of memory, the time of a recalibration."""
    load = traces.read_trace(trace, rows)
    setting = replay.Setting(replay.limits_for(load, 111_000))
    served = replay.load_of(load, setting.limits)
    tuning, name = replay.read_tuning(), replay.check_name(policy)
    seconds, resident = [], []
    with workplace() as directory:
        for _ in range(repeat + 1):  # the first is not counted: it warms up
            started = time.process_time()
            outcome = replay.run_policy(name, served, setting, tuning, directory)
            seconds.append(time.process_time() - started)
            resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    best = min(seconds[1:])
    figures: dict[str, Any] = {
        "trace": load.label,
        "policy": name,
        "requests": len(served),
        "requests_per_minute": round(len(served) / best * 60),
        "cpu_seconds": round(best, 3),
        "steps": outcome.history.steps,
        "decisions": outcome.history.decisions,
        "peak_resident_mib": round(resident[-1] / 1024, 1),
        "peak_growth_after_first_run_mib": round((resident[-1] - resident[0]) / 1024, 1),
        "recalibration_ms": round(recalibration_seconds() * 1e3, 4),
    }
    show(figures, as_json)


def recalibration_seconds() -> float:
    """Return the median time to find 16 limits over 512 bins."""
    random = np.random.default_rng(1)
    weights = random.exponential(1.0, RECALIBRATION_BINS)
    upper = np.arange(1, RECALIBRATION_BINS + 1, dtype=np.uint32) * np.uint32(16)
    taken = []
    for _ in range(51):
        started = time.perf_counter()
        optimal_limits(weights, upper, RECALIBRATION_LIMITS)
        taken.append(time.perf_counter() - started)
    return sorted(taken)[25]
