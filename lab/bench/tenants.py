"""`odma bench tenants`: what a guarantee gives its owner, and what it costs the others.

Two tenants share a pool in the replay. One is steady: Poisson arrivals of short chats. The
other bursts: nothing for minutes, then more requests at once than the pool holds. What is
compared is the policy record alone: the engine keeps a line for each tenant, asks in order of
arrival, and preempts whom a refusal names.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from odma_service import replay, traces
from odma_service.replay.prices import PICOSECONDS
from odma_service.replay.workplace import workplace
from odma_service.values import TenantShare

STEADY, BURSTY = "steady", "bursty"
SECONDS = 3_600
STEADY_PER_SECOND = 0.3
BURSTS, BURST_REQUESTS = 6, 120
SHARE = 0.4
VARIANTS: dict[str, tuple[TenantShare, ...]] = {
    "no shares": (),
    "steady guaranteed": (TenantShare(STEADY, SHARE),),
    "walls": (TenantShare(STEADY, SHARE, SHARE), TenantShare(BURSTY, 0, 1 - SHARE)),
}
"""Shares by name. Behind walls nothing is lent: the sum of the maxima is the pool."""


app = typer.Typer()


@app.command()
def command(
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Traces to make.")] = 5,
    policy: Annotated[str, typer.Option(help=f"One of {', '.join(replay.NAMES)}.")] = "elastic",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tokens a second, waiting and preemptions of two tenants, with guarantees and without."""
    tuning, name = replay.read_tuning(), replay.check_name(policy)
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    with workplace() as directory:
        for seed in range(seeds):
            trace = burst_trace(seed)
            setting = replay.Setting(replay.limits_for(trace, 111_000), closed=False)
            load = replay.load_of(trace, setting.limits)
            for variant, shares in VARIANTS.items():
                chosen = replace(setting, tenants=shares)
                outcome = replay.run_policy(name, load, chosen, tuning, directory)
                runs[variant].append(_figures(outcome.history, load))
    figures = {
        "policy": name,
        "seeds": seeds,
        "requests": len(load),
        "guaranteed_share": SHARE,
        "variants": {variant: _means(each) for variant, each in runs.items()},
    }
    if as_json:
        typer.echo(json.dumps(figures))
    else:
        Console().print(_table(figures))


def burst_trace(seed: int) -> traces.Trace:
    """Return an hour of both tenants, the same for the same seed."""
    random = np.random.default_rng(seed)
    steady = random.uniform(0, SECONDS, random.poisson(SECONDS * STEADY_PER_SECOND))
    starts = (np.arange(BURSTS) + 0.25) * SECONDS / BURSTS
    bursts = np.repeat(starts, BURST_REQUESTS) + random.uniform(0, 5, BURSTS * BURST_REQUESTS)
    count = len(steady) + len(bursts)
    is_bursty = np.arange(count) >= len(steady)
    inputs = random.lognormal(np.log(np.where(is_bursty, 600, 250)), 0.7, count)
    outputs = random.lognormal(np.log(np.where(is_bursty, 900, 300)), 0.8, count)
    t_seconds = np.concatenate([steady, bursts])
    order = np.argsort(t_seconds, kind="stable")
    return traces.Trace(
        t_seconds[order],
        np.rint(inputs[order]).clip(1, 8_192).astype(np.int64),
        np.rint(outputs[order]).clip(1, 4_096).astype(np.int64),
        f"two tenants, seed={seed}",
        tenant=tuple(BURSTY if bursty else STEADY for bursty in is_bursty[order]),
    )


def _figures(history: replay.History, load: replay.Load) -> dict[str, Any]:
    """Return one run in numbers; of all of it, for a burst has no steady state."""
    whole = replay.Window(0, len(history.finished), steady=False)
    outputs = [request.output_tokens for request in load.requests]
    measures = replay.measure(history, whole, load.limits.capacity_tokens, outputs)
    figures = {
        "tokens_per_s": measures.tokens_per_s,
        "burst_tokens_per_s": _burst_tokens_per_s(history, load),
        "recomputed_tokens": measures.recomputed_tokens,
    }
    for tenant, got in replay.by_tenant(history, whole, load.requests).items():
        figures |= {
            f"{tenant}_wait_p50_s": got.ttft_s.p50,
            f"{tenant}_wait_p99_s": got.ttft_s.p99,
            f"{tenant}_preemptions": got.preemptions,
        }
    return figures


def _burst_tokens_per_s(history: replay.History, load: replay.Load) -> float:
    """Return what the bursty tenant got while its bursts were served, first arrival to last end."""
    begins: dict[int, int] = {}
    ends: dict[int, int] = {}
    tokens = 0
    for number, request in enumerate(load.requests):
        if request.tenant == BURSTY:
            arrived = history.arrived_ps[number]
            burst = int(load.arrivals_seconds[number] * BURSTS / SECONDS)
            begins[burst] = min(begins.get(burst, arrived), arrived)
            ends[burst] = max(ends.get(burst, 0), history.finished_ps[number])
            tokens += request.output_tokens
    return tokens / sum(ends[burst] - begins[burst] for burst in begins) * PICOSECONDS


def _means(runs: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return means with half of their 95 % confidence intervals."""
    means = {name: replay.interval([run[name] for run in runs]) for name in runs[0]}
    return {
        name: {"mean": round(mean, 2), "ci95": None if half is None else round(half, 2)}
        for name, (mean, half) in means.items()
    }


def _table(figures: dict[str, Any]) -> Table:
    table = Table("", *VARIANTS)
    for row in next(iter(figures["variants"].values())):
        cells = [figures["variants"][variant][row] for variant in VARIANTS]
        table.add_row(row, *(f"{c['mean']:,.1f} ± {c['ci95'] or 0:,.1f}" for c in cells))
    return table
