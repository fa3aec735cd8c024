"""One policy, from the opening of its pool to the balancing of its books."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from odma_service.client import Client, PoolClient
from odma_service.demo.device import Device
from odma_service.demo.remote import RemoteMemory
from odma_service.demo.report import Outcome
from odma_service.errors import UnimplementedError
from odma_service.pool.policy import named
from odma_service.replay.load import Limits, Load, load_of
from odma_service.replay.loop import History, Loop
from odma_service.replay.measure import measure, window_of
from odma_service.replay.pooled import EngineKind
from odma_service.replay.prices import Prices
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.traces import Trace
from odma_service.values import PlaneGroup, PolicyChange

# K and V of the 28 layers of DeepSeek-R1-Distill-Qwen-7B, 4 heads of 128 in bf16.
PLANES = PlaneGroup(count=56, bytes_per_token=1_024)
PRESET = "mlu370-x4"
LEAST_REGIONS = 1_024
USUAL_LIMITS = Limits(4_096, 16_384, 111_000)
STEPS = Prices(60 * 10**9, 0, 0, 0, 0, 0)
"""Every decode step takes as long, 60 ms: which matters where requests wait for answers."""


@dataclass(frozen=True, slots=True)
class Setting:
    """An engine: its size, and what it can do. drop_copy is the number of a copy to skip."""

    limits: Limits = USUAL_LIMITS
    kind: EngineKind = field(default_factory=EngineKind)
    batch_cap: int = 256
    overtake: int = 0
    drop_copy: int = 0


def open_pool(service: Client, policy: str, setting: Setting) -> PoolClient:
    """Open a pool that nobody has used, so that nothing is learnt from an earlier demo."""
    limits, kind = setting.limits, setting.kind
    return service.open_pool(
        f"demo-{policy}-{uuid.uuid4().hex[:8]}",
        preset=PRESET,
        planes=[PLANES],
        capacity_tokens=limits.capacity_tokens,
        model_length_tokens=limits.model_length_tokens,
        moves=kind.moves,
        single_ordered_stream=kind.single_stream,
        copies_may_overlap=kind.copies_may_overlap,
        policy=PolicyChange(name=policy),
        max_regions=max(LEAST_REGIONS, setting.batch_cap),
        granule_tokens=kind.granule_tokens,
        reads_two_runs=kind.reads_two_runs,
    )


def play(
    service: Client, trace: Trace, policy: str, setting: Setting, watch: Callable[[History], None]
) -> Outcome:
    """Play the trace under one policy, in a pool of its own; watch every decision.

    Raises InvalidError if no request can ever fit.
    """
    started = time.monotonic()
    kind = setting.kind
    pool = open_pool(service, policy, setting)
    try:
        limits = replace(setting.limits, capacity_tokens=pool.response.capacity_tokens)
        load = load_of(trace, limits)
        device = Device(
            limits.capacity_tokens,
            ordered=kind.single_stream,
            may_overlap=kind.copies_may_overlap,
            drop_copy=setting.drop_copy,
        )
        kind = replace(kind, granule_tokens=pool.response.granule_tokens)  # 0: it knows none
        record = named(policy, limits.model_length_tokens, limits.capacity_tokens)
        memory = RemoteMemory(pool, device, record, kind, block_tokens=load.block_tokens)
        loop = Loop(load, memory, STEPS, setting.batch_cap, overtake=setting.overtake)
        while loop.advance():
            watch(loop.history)
        loop.give_back()
        memory.complete()
        books = service.get_pool(pool.ref.name)
    finally:
        pool.close_pool()
        with suppress(UnimplementedError):  # of a service that is older
            service.forget_pool(pool.ref)
    seconds = time.monotonic() - started
    return _outcome(trace, policy, load, loop.history, memory, device, books, seconds)


def _outcome(
    trace: Trace,
    policy: str,
    load: Load,
    history: History,
    memory: RemoteMemory,
    device: Device,
    books: pool_pb.GetPoolResponse,
    seconds: float,
) -> Outcome:
    p50_us, p99_us = np.percentile(memory.apply_ns, (50, 99)) / 1e3
    outputs = [request.output_tokens for request in load.requests]
    short = memory.refusals > 0
    measures = measure(history, window_of([history]), load.limits.capacity_tokens, outputs)
    return Outcome(
        policy=policy,
        requests=len(trace),
        finished=len(history.finished),
        never_fit=load.dropped,
        refusals=memory.refusals,
        preempted=history.preemptions,
        tokens_generated=memory.tokens_generated,
        tokens_expected=sum(outputs),
        tokens_checked=device.tokens_checked,
        prompt_tokens=history.prompt_tokens,
        reused_tokens=history.reused_tokens,
        violations=device.violations,
        utilisation_written_over_capacity=_share(measures.utilisation_written_over_capacity, short),
        utilisation_written_over_reserved=_share(measures.utilisation_written_over_reserved, short),
        copies=device.copies,
        copied_tokens=device.copied_tokens,
        relocations=books.counters.relocations,
        compactions=books.counters.compactions,
        apply_p50_us=round(float(p50_us), 1),
        apply_p99_us=round(float(p99_us), 1),
        balanced=_balanced(load, history, memory, device, books),
        steps=history.steps,
        applies=len(memory.apply_ns),
        seconds=round(seconds, 1),
        trace=trace.label,
    )


def _share(share: float, short: bool) -> float | None:
    return round(share, 4) if short else None


def _balanced(
    load: Load,
    history: History,
    memory: RemoteMemory,
    device: Device,
    books: pool_pb.GetPoolResponse,
) -> bool:
    """Everything was given back, and the service has counted what the engine has."""
    counters = books.counters
    finished, preempted = len(history.finished), history.preemptions
    hit_limit = sum(load.requests[number].limited for number in history.finished)
    return (
        books.summary.regions == 0
        and books.summary.free_tokens == books.summary.capacity_tokens
        and counters.allocates == counters.frees == finished + preempted
        and counters.preempted == preempted
        and counters.finished == finished - hit_limit
        and counters.hit_limit == hit_limit
        and counters.refused_allocates + counters.refused_extends == memory.refusals
        and counters.copies == device.copies
        and counters.copied_tokens == device.copied_tokens
    )
