"""Comparing: every policy on the same load, in the same window, over several seeds.

Ideal paging with 16-token pages always runs along: it is what a figure is a share of. It also
tells whether the load is short of memory at all: only where the same paging with a pool that
never fills gives at least a tenth more does a ratio on that load say anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, cast

from odma_service._native import Reuse
from odma_service.replay.arena import ArenaMemory, PolicyEvent
from odma_service.replay.load import Limits, Load, load_of, shuffled
from odma_service.replay.loop import History, serve
from odma_service.replay.measure import (
    MEMORY_BOUND_RATIO,
    Interval,
    Measures,
    TenantMeasures,
    Window,
    by_tenant,
    interval,
    measure,
    window_of,
)
from odma_service.replay.policies import (
    HINDSIGHT_SHARES,
    IDEAL,
    IDEAL_BEST,
    PAGES,
    PREFIX_POLICIES,
    REUSE,
    UNLIMITED,
    Tuning,
    memory_of,
)
from odma_service.replay.prices import Serving
from odma_service.traces import Trace
from odma_service.values import Moves, TenantShare

NO_PREFIX_REUSE = "no prefix reuse"
PREFIX_REUSE = "whole blocks, the least recently used evicted"
RUN_REUSE = "runs with granules, given up by the arena"
Progress = Callable[[str, int, int], None]
"""Takes a policy, a seed, and the number of requests that have finished."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is held fixed in a comparison."""

    limits: Limits
    serving: Serving = field(default_factory=Serving)
    batch_cap: int = 256
    closed: bool = True
    rate: float = 1.0
    predictor: str | None = None
    seeds: int = 1
    tenants: tuple[TenantShare, ...] = ()
    moves: Moves | None = None  # None: as each policy is for
    granule_tokens: int = 0  # 0: the blocks of the trace


class Safety(NamedTuple):
    """How often the safety pool was used, by cause, and how often limits changed."""

    growth: int = 0
    unsure: int = 0
    recalibrations: int = 0


@dataclass(slots=True)
class Outcome:
    """One policy on one seed."""

    policy: str
    seed: int
    history: History
    safety: Safety
    events: list[PolicyEvent] = field(default_factory=list)
    reuse: Reuse = field(default_factory=Reuse)
    measures: Measures | None = None
    tenants: dict[str, TenantMeasures] = field(default_factory=dict)  # where there are several


@dataclass(frozen=True, slots=True)
class LoadClass:
    """Whether memory is what a load is short of."""

    memory_bound: bool
    unlimited_over_ideal: float

    @property
    def name(self) -> str:
        """The class as a word."""
        return "memory-bound" if self.memory_bound else "not memory-bound"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every policy on one trace, by seed."""

    label: str
    requests: int
    dropped: int
    waiting: int
    setting: Setting
    tuning: Tuning
    load_class: LoadClass
    windows: tuple[Window, ...]
    outcomes: dict[str, list[Outcome]]
    notes: tuple[str, ...] = ()

    def rates(self, policy: str) -> list[float]:
        """Return tokens per second, by seed."""
        return [_known(outcome).tokens_per_s for outcome in self.outcomes[policy]]

    def ratio(self, policy: str, to: str) -> Interval:
        """Return one policy's tokens per second over another's, paired by seed."""
        pairs = zip(self.rates(policy), self.rates(to), strict=True)
        return interval([ours / theirs for ours, theirs in pairs])


def compare(
    trace: Trace,
    policies: Sequence[str],
    setting: Setting,
    tuning: Tuning,
    directory: Path,
    watch: Progress | None = None,
) -> Comparison:
    """Serve a trace under every policy; seed 0 is the trace as it is, others reorder it."""
    names = list(dict.fromkeys((IDEAL, *policies)))
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    windows: list[Window] = []
    ratios: list[float] = []
    for seed in range(setting.seeds):
        load = load_of(shuffled(trace, seed), setting.limits, rate=setting.rate)
        lengths = [request.output_tokens for request in load.requests]
        runs = {
            name: run_policy(name, load, setting, tuning, directory, seed, watch)
            for name in (UNLIMITED, *names)
            if name != IDEAL_BEST
        }
        unlimited = runs.pop(UNLIMITED)
        ratios.append(_over(unlimited, runs[IDEAL], [], setting, lengths))
        if IDEAL_BEST in names:
            runs[IDEAL_BEST] = _best_in_hindsight(runs, load, setting, directory, seed)
        window = window_of(run.history for run in runs.values())
        for run in (runs[name] for name in names):
            run.measures = measure(run.history, window, setting.limits.capacity_tokens, lengths)
            if len({request.tenant for request in load.requests}) > 1:
                run.tenants = by_tenant(run.history, window, load.requests)
            outcomes[run.policy].append(run)
        windows.append(window)
    mean = sum(ratios) / len(ratios)
    return Comparison(
        trace.label,
        len(load),
        load.dropped,
        sum(after >= 0 for after in load.after),
        setting,
        tuning,
        LoadClass(mean >= MEMORY_BOUND_RATIO, mean),
        tuple(windows),
        outcomes,
        trace.notes,
    )


def run_policy(
    name: str,
    load: Load,
    setting: Setting,
    tuning: Tuning,
    directory: Path,
    seed: int = 0,
    watch: Progress | None = None,
) -> Outcome:
    """Serve a load under one policy; `ideal-best` is none alone, but the best of a comparison."""
    with memory_of(
        name,
        load,
        setting.serving,
        tuning.of(IDEAL if name == UNLIMITED else name),
        directory,
        predictor_name=setting.predictor,
        seed=seed,
        batch_cap=setting.batch_cap,
        tenants=setting.tenants,
        moves=setting.moves,
        granule_tokens=setting.granule_tokens,
    ) as memory:
        history = serve(
            load,
            memory,
            setting.serving.prices(memory.kv_bandwidth_share),
            batch_cap=setting.batch_cap,
            closed=setting.closed,
            watch=None if watch is None else lambda finished: watch(name, seed, finished),
        )
        if not isinstance(memory, ArenaMemory):
            return Outcome(name, seed, history, Safety())
        report = memory.pool.report()
        counters = report.counters
        safety = Safety(
            counters.safety_hits_growth, counters.safety_hits_unsure, memory.recalibrations
        )
        return Outcome(name, seed, history, safety, memory.events, report.reuse)


def _best_in_hindsight(
    others: Mapping[str, Outcome], load: Load, setting: Setting, directory: Path, seed: int
) -> Outcome:
    """Return ideal paging with the headroom that gives most where it is reported.

    That is the window which it has with the others; `ideal-16` is one of those tried.
    """
    lengths = [request.output_tokens for request in load.requests]
    ideal = others[IDEAL]
    tried = [
        run_policy(IDEAL, load, setting, Tuning({IDEAL: {"headroom_share": share}}, ""), directory)
        for share in HINDSIGHT_SHARES
    ]
    best = max(
        (ideal, *tried),
        key=lambda run: _over(run, ideal, others.values(), setting, lengths),
    )
    return replace(best, policy=IDEAL_BEST, seed=seed)


def as_object(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON has it; what is no number is None."""
    setting, limits = comparison.setting, comparison.setting.limits
    facts = {
        "trace": comparison.label,
        "load_class": comparison.load_class.name,
        "unlimited_over_ideal_paging": round(comparison.load_class.unlimited_over_ideal, 4),
        "device": str(setting.serving.device),
        "assumptions": assumptions(setting, waits=comparison.waiting > 0),
        "parameter_hash": comparison.tuning.digest,
        "requests": comparison.requests,
        "dropped": comparison.dropped,
        "waiting_requests": comparison.waiting,
        "notes": list(comparison.notes),
        "capacity_tokens": limits.capacity_tokens,
        "max_output_tokens": limits.max_output_tokens,
        "model_length_tokens": limits.model_length_tokens,
        "seeds": setting.seeds,
        "windows": [window._asdict() for window in comparison.windows],
        "policies": {name: _policy_object(comparison, name) for name in comparison.outcomes},
    }
    return cast("dict[str, Any]", _finite(facts))


def _finite(value: Any) -> Any:
    """Return what JSON has with None for every number that it has not."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def assumptions(setting: Setting, *, waits: bool) -> dict[str, Any]:
    """Return what the figures rest on besides the trace; `waits`: requests wait for answers."""
    serving = setting.serving
    loop = "closed" if setting.closed else f"open, arrivals x {setting.rate:g}"
    if waits:
        loop = f"after answers, waits x {1 / setting.rate:g}"
    return {
        **asdict(serving),
        "device": str(serving.device),
        "bandwidth_bytes_per_second": serving.lpddr.peak_bytes_per_second,
        "sequential_bandwidth_share": round(
            serving.sequential_bytes_per_second / serving.lpddr.peak_bytes_per_second, 4
        ),
        "copy_bandwidth_share": round(serving.copying.copy_efficiency, 4),
        "descriptor_seconds": serving.copying.descriptor_seconds,
        "paged_bandwidth_shares": {str(page): round(serving.page_share(page), 4) for page in PAGES},
        "batch_cap": setting.batch_cap,
        "loop": loop,
        "prefill": "whole prompts",
        "preemption": "by swap" if serving.swap_bytes_per_second else "by recompute",
        "prefix_cache": NO_PREFIX_REUSE,
        "granule_tokens": setting.granule_tokens or "as the blocks of the trace",
        "tenants": [tenant._asdict() for tenant in setting.tenants],
        "moves": "as each policy is for" if setting.moves is None else setting.moves.name,
        "predictor": setting.predictor or "odma: live histograms, s3: lognormal:0.5",
    }


def _policy_object(comparison: Comparison, name: str) -> dict[str, Any]:
    runs = comparison.outcomes[name]
    rate, ratio = interval(comparison.rates(name)), comparison.ratio(name, IDEAL)

    def mean(name: str) -> float:
        pick = attrgetter(name)
        return sum(float(pick(_known(run))) for run in runs) / len(runs)

    shown: dict[str, Any] = {
        "tokens_per_s": round(rate.mean, 3),
        "tokens_per_s_ci95": rate.half and round(rate.half, 3),
        "over_ideal_paging": round(ratio.mean, 4),
        "over_ideal_paging_ci95": ratio.half and round(ratio.half, 4),
    }
    for field_name, digits in (
        ("tokens_per_s_whole_run", 3),
        ("requests_per_s", 5),
        ("utilisation_written_over_capacity", 4),
        ("utilisation_written_over_reserved", 4),
        ("mean_running", 2),
        ("preemptions", 1),
        ("recomputed_tokens", 1),
        ("swapped_tokens", 1),
        ("prompt_tokens", 1),
        ("reused_tokens", 1),
        ("copies", 1),
        ("copied_tokens", 1),
        ("copy_share_of_time", 5),
        ("prefill_share_of_time", 4),
    ):
        shown[field_name] = _whole(round(mean(field_name), digits))
    for latency in ("ttft", "tpot"):
        for part in ("p50", "p95", "p99"):
            shown[f"{latency}_{part}_s"] = round(mean(f"{latency}_s.{part}"), 5)
    hits = [run.safety for run in runs]
    shown["safety_hits"] = _whole(sum(s.growth + s.unsure for s in hits) / len(hits))
    shown["safety_hits_growth"] = _whole(sum(s.growth for s in hits) / len(hits))
    shown["safety_hits_unsure"] = _whole(sum(s.unsure for s in hits) / len(hits))
    shown["recalibrations"] = _whole(sum(s.recalibrations for s in hits) / len(hits))
    for part in ("adopted_tokens", "gathered_tokens", "shared_tokens", "given_up_tokens"):
        shown[part] = _whole(sum(getattr(run.reuse, part) for run in runs) / len(runs))
    shown["prefix_cache"] = (
        PREFIX_REUSE if name in PREFIX_POLICIES else RUN_REUSE if name == REUSE else NO_PREFIX_REUSE
    )
    if runs[0].tenants:
        shown["tenants"] = {tenant: _tenant_object(runs, tenant) for tenant in runs[0].tenants}
    shown["parameters"] = dict(comparison.tuning.of(name))
    return shown


def _tenant_object(runs: Sequence[Outcome], tenant: str) -> dict[str, float]:
    got = [run.tenants[tenant] for run in runs if tenant in run.tenants]

    def mean(name: str) -> float:
        pick = attrgetter(name)
        return _whole(round(sum(float(pick(one)) for one in got) / len(got), 3))

    return {
        "requests": mean("requests"),
        "tokens_per_s": mean("tokens_per_s"),
        "ttft_p50_s": mean("ttft_s.p50"),
        "ttft_p99_s": mean("ttft_s.p99"),
        "preemptions": mean("preemptions"),
    }


def _over(
    run: Outcome,
    ideal: Outcome,
    others: Iterable[Outcome],
    setting: Setting,
    lengths: Sequence[int],
) -> float:
    """Return a run's tokens per second over those of ideal paging, in the window of all these."""
    window = window_of(each.history for each in (run, ideal, *others))
    capacity = setting.limits.capacity_tokens
    rates = [measure(r.history, window, capacity, lengths).tokens_per_s for r in (run, ideal)]
    return rates[0] / rates[1]


def _known(outcome: Outcome) -> Measures:
    assert outcome.measures is not None
    return outcome.measures


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value
