"""Tuning: one rule for every policy's free parameters.

The rule: of the values in GRIDS, those that give the most tokens per second, as the geometric
mean over the training loads, relative to ideal paging without headroom. Parameters are tried
one after the other, each at the best values so far of the others, in two rounds. Training
loads are seeds and parts of traces that no figure is quoted from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from odma_service.replay.compare import Outcome, Setting, run_policy
from odma_service.replay.load import Load, limits_for, load_of
from odma_service.replay.measure import measure, window_of
from odma_service.replay.policies import (
    EXTENT_POLICIES,
    IDEAL,
    IDEAL_BEST,
    PAGED_POLICIES,
    PREFIX_POLICIES,
    REUSE,
    Tuning,
)
from odma_service.traces import Trace, generate, read_trace, sample_servegen

ROUNDS = 2
TRAINED_ON = {"mooncake_conversation_first2thirds": 700}
"""How many of its first rows are training data, by the label of a trace."""

SHARES = (0.03, 0.05, 0.08, 0.12, 0.2)

GRIDS: Mapping[str, Mapping[str, Sequence[float]]] = {
    "static": {},
    "oracle": {},
    IDEAL_BEST: {},
    "s3": {"overflow_risk": (0.5, 0.3, 0.1), "growth": (1.5, 2.0)},
    "odma": {
        "buckets": (8, 12, 16),
        "overflow_risk": (0.3, 0.5, 0.7, 0.9),
        "safety_share": SHARES,
        "unsure_ratio": (4.0, 8.0, 16.0),
        "growth": (1.0, 1.1, 1.25, 1.5),
    },
    **{
        name: {"safety_share": (0.03, 0.05, 0.08), "step_tokens": (48, 64, 80, 96, 128)}
        for name in ("elastic", REUSE)
    },
    "elastic-streams": {
        "safety_share": (0.08, 0.12, 0.15, 0.2),
        "step_tokens": (48, 64, 80, 128),
        "growth": (1.0, 1.02, 1.05, 1.1),
    },
    "grow-copy": {
        "safety_share": (0.1, 0.15, 0.2, 0.3),
        "step_tokens": (64, 128, 256),
        "growth": (1.0, 1.05, 1.1, 1.25),
    },
    **{
        name: {"headroom_share": (0.05, 0.15, 0.25, 0.35), "step_tokens": (64, 128, 256, 512)}
        for name in EXTENT_POLICIES
    },
    **{
        name: {"headroom_share": (0.0, 0.01, 0.02, 0.03, 0.05, 0.08)}
        for name in (*PAGED_POLICIES, *PREFIX_POLICIES)
    },
}

Say = Callable[[str], None]


def training_traces(data: Path) -> list[Trace]:
    """Return what is tuned on, from a folder with the public traces.

    Raises TraceError if one of them is not there.
    """
    servegen = data / "servegen"
    mooncake, rows = next(iter(TRAINED_ON.items()))
    return [
        reasoning_like(700, 101),
        generate(700, 102),
        read_trace(data / "traces" / f"{mooncake}.parquet", rows),
        sample_servegen(
            servegen / "deepseek_r1_rates_first18h.parquet",
            servegen / "deepseek_r1_hist_first18h.parquet",
            rows=500,
            seed=103,
            hours=4,
        ),
        sample_servegen(
            servegen / "m_large_rates.parquet",
            servegen / "m_large_hist.parquet",
            rows=900,
            seed=104,
            start_hours=48,
            hours=6,
        ),
    ]


def marked(trace: Trace, skip: int) -> Trace:
    """Return the trace after `skip` requests, with a note if what is left was trained on."""
    notes: tuple[str, ...] = (f"the first {skip} requests are left out",) if skip else ()
    trained = TRAINED_ON.get(trace.label, 0)
    if skip < trained:
        notes += (f"not a test: parameters were tuned on its first {trained} rows (--skip them)",)
    rest = trace.without_first(skip) if skip else trace
    return replace(rest, notes=rest.notes + notes)


def reasoning_like(rows: int, seed: int) -> Trace:
    """Return a heavy-tailed load: log-normal prompts (median 120) and answers (median 700)."""
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1.0, rows))
    inputs = np.rint(random.lognormal(math.log(120), 0.7, rows)).clip(8, 2_000)
    outputs = np.rint(random.lognormal(math.log(700), 1.0, rows)).clip(4, 14_384)
    label = f"reasoning-like seed={seed}"
    return Trace(arrivals, inputs.astype(np.int64), outputs.astype(np.int64), label)


class Tuner:
    """Tries parameters on training loads."""

    def __init__(self, training: Sequence[Trace], capacity_tokens: int, directory: Path) -> None:
        self._directory = directory
        self._loads: list[tuple[Setting, Load, Outcome]] = []
        for trace in training:
            setting = Setting(limits_for(trace, capacity_tokens))
            load = load_of(trace, setting.limits)
            base = run_policy(IDEAL, load, setting, Tuning({}, ""), directory)
            self._loads.append((setting, load, base))

    def tune(self, name: str, say: Say) -> dict[str, float]:
        """Return the best parameters of a policy."""
        grids = GRIDS[name]
        best = {parameter: values[len(values) // 2] for parameter, values in grids.items()}
        known: dict[tuple[float, ...], float] = {}
        for _ in range(ROUNDS):
            for parameter, values in grids.items():
                scores = {}
                for value in values:
                    tried = best | {parameter: value}
                    key = tuple(tried.values())
                    if key not in known:
                        known[key] = self.score(name, tried)
                        say(f"{name}: {tried}: {known[key]:.4f}")
                    scores[value] = known[key]
                best[parameter] = max(scores, key=lambda value: scores[value])
        return best

    def score(self, name: str, parameters: Mapping[str, float]) -> float:
        """Return the geometric mean of tokens per second over those of plain ideal paging."""
        tuning = Tuning({name: parameters}, "")
        logs = []
        for setting, load, base in self._loads:
            run = run_policy(name, load, setting, tuning, self._directory)
            window = window_of((base.history, run.history))
            outputs = [request.output_tokens for request in load.requests]
            ours, theirs = (
                measure(each.history, window, setting.limits.capacity_tokens, outputs).tokens_per_s
                for each in (run, base)
            )
            logs.append(math.log(ours / theirs))
        return math.exp(sum(logs) / len(logs))
