"""One policy, from the opening of its pool to the balancing of its books."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence

import numpy as np

from odma_service.client import Client, PoolClient
from odma_service.demo.device import Device
from odma_service.demo.engine import Engine, EngineKind, Tally
from odma_service.demo.load import Limits, Request, requests_of
from odma_service.demo.report import Outcome
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.traces import Trace
from odma_service.values import PlaneGroup, PolicyChange

# K and V of the 28 layers of DeepSeek-R1-Distill-Qwen-7B, 4 heads of 128 in bf16.
PLANES = PlaneGroup(count=56, bytes_per_token=1_024)
PRESET = "mlu370-x4"
LEAST_REGIONS = 1_024


def play(
    service: Client, trace: Trace, policy: str, kind: EngineKind, watch: Callable[[Tally], None]
) -> Outcome:
    """Play the trace under one policy, in a pool of its own; watch every step."""
    started = time.monotonic()
    pool = _open(service, policy, kind)
    try:
        capacity_tokens = pool.response.capacity_tokens
        limits = Limits(kind.max_output_tokens, kind.model_length_tokens, capacity_tokens)
        requests = requests_of(trace, limits)
        device = Device(
            capacity_tokens,
            ordered=kind.single_stream,
            may_overlap=kind.copies_may_overlap,
            drop_copy=kind.drop_copy,
        )
        engine = Engine(pool, device, requests, kind)
        engine.play(watch)
        books = service.get_pool(pool.ref.name)
    finally:
        pool.close_pool()
    seconds = time.monotonic() - started
    return _outcome(trace, policy, requests, engine.tally, device, books, seconds)


def _open(service: Client, policy: str, kind: EngineKind) -> PoolClient:
    """Open a pool that nobody has used, so that nothing is learnt from an earlier demo."""
    return service.open_pool(
        f"demo-{policy}-{uuid.uuid4().hex[:8]}",
        preset=PRESET,
        planes=[PLANES],
        capacity_tokens=kind.capacity_tokens,
        model_length_tokens=kind.model_length_tokens,
        moves=kind.moves,
        single_ordered_stream=kind.single_stream,
        copies_may_overlap=kind.copies_may_overlap,
        policy=PolicyChange(name=policy),
        max_regions=max(LEAST_REGIONS, kind.batch_cap),
    )


def _outcome(
    trace: Trace,
    policy: str,
    requests: Sequence[Request],
    tally: Tally,
    device: Device,
    books: pool_pb.GetPoolResponse,
    seconds: float,
) -> Outcome:
    p50_us, p99_us = np.percentile(tally.apply_ns or [0], (50, 99)) / 1e3
    window_steps = tally.window_steps
    return Outcome(
        policy=policy,
        requests=len(trace),
        finished=tally.finished,
        never_fit=len(trace) - len(requests),
        refusals=tally.refusals,
        preempted=tally.preempted,
        tokens_generated=tally.tokens_generated,
        tokens_expected=sum(request.output_tokens for request in requests),
        tokens_checked=device.tokens_checked,
        violations=device.violations,
        utilisation_written_over_capacity=_mean(tally.written_over_capacity, window_steps),
        utilisation_written_over_reserved=_mean(tally.written_over_reserved, window_steps),
        copies=device.copies,
        copied_tokens=device.copied_tokens,
        relocations=books.counters.relocations,
        compactions=books.counters.compactions,
        apply_p50_us=round(float(p50_us), 1),
        apply_p99_us=round(float(p99_us), 1),
        balanced=_balanced(tally, device, books),
        steps=tally.steps,
        applies=len(tally.apply_ns),
        seconds=round(seconds, 1),
        trace=trace.label,
    )


def _mean(total: float, steps: int) -> float | None:
    return round(total / steps, 4) if steps else None


def _balanced(tally: Tally, device: Device, books: pool_pb.GetPoolResponse) -> bool:
    """Everything was given back, and the service has counted what the engine has."""
    counters = books.counters
    return (
        books.summary.regions == 0
        and books.summary.free_tokens == books.summary.capacity_tokens
        and counters.allocates == counters.frees == tally.finished + tally.preempted
        and counters.preempted == tally.preempted
        and counters.finished == tally.finished - tally.hit_limit
        and counters.hit_limit == tally.hit_limit
        and counters.refused_allocates + counters.refused_extends == tally.refusals
        and counters.copies == device.copies
        and counters.copied_tokens == device.copied_tokens
    )
