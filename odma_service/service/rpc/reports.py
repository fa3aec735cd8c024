"""Pools as the messages of PoolService."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from odma_service._native import ArenaReport, Counters, RegionEntry, Reuse, TenantUse
from odma_service.learning import Learner, Source
from odma_service.pool import ClassHistory, Pool
from odma_service.pool.policy import PolicyRecord
from odma_service.rpc.v1 import pool_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.service.pools.registry import View
from odma_service.wire import planes_to, tenants_to

Weights = NDArray[np.float64]

BASES = {
    Source.NOTHING: types.PREDICTION_BASIS_NOTHING,
    Source.HISTOGRAM: types.PREDICTION_BASIS_HISTOGRAM,
    Source.MODEL: types.PREDICTION_BASIS_MODEL,
    Source.WINDOW: types.PREDICTION_BASIS_WINDOW,
}


def summary_to(view: View) -> pb.PoolSummary:
    """Return the summary of a pool. The epoch of a closed pool is its last one."""
    return _summary_to(view, view.pool.report())


def pool_to(view: View) -> pb.GetPoolResponse:
    """Return the full report of a pool. What the books count is of one moment."""
    pool, spec, report = view.pool, view.pool.spec, view.pool.report()
    upper, histogram, policy = pool.bins(), pool.histogram(), pool.policy()
    return pb.GetPoolResponse(
        summary=_summary_to(view, report),
        block_tokens=spec.block_tokens,
        model_length_tokens=spec.model_length_tokens,
        bytes_per_token=spec.geometry.bytes_per_token,
        planes=planes_to(spec.geometry.planes),
        moves=cast("types.Moves.ValueType", int(spec.moves)),
        single_ordered_stream=spec.single_ordered_stream,
        copies_may_overlap=spec.copies_may_overlap,
        max_regions=spec.max_regions,
        last_seq=report.seq,
        completed_seq=report.completed_seq,
        policy=policy_to(policy),
        reserved_tokens=report.reserved_tokens,
        used_tokens=report.used_tokens,
        awaiting_completion_tokens=report.awaiting_completion_tokens,
        largest_run_tokens=report.largest_run_tokens,
        free_runs=report.free_runs,
        safety_tokens=report.safety_tokens,
        buckets=_buckets(pool, policy.limits_tokens),
        counters=_counters_to(report.counters),
        classes=[_class_to(history, view.learner) for history in pool.classes()],
        total_histogram=_bins(upper, histogram.total_finished, histogram.total_censored),
        output_histogram=_bins(upper, histogram.output_finished, histogram.output_censored),
        model_version=view.learner.model_version,
        tenants=map(_tenant_to, pool.tenants()),
        granule_tokens=spec.granule_tokens,
        reads_two_runs=spec.reads_two_runs,
        reuse=_reuse_to(report.reuse) if spec.granule_tokens else None,
    )


def policy_to(policy: PolicyRecord) -> types.Policy:
    """Return the message of a policy record."""
    return types.Policy(
        name=policy.name,
        version=policy.version,
        start=cast("types.Start.ValueType", int(policy.start)),
        overflow=cast("types.Overflow.ValueType", int(policy.overflow)),
        step_tokens=policy.step_tokens,
        limits_tokens=policy.limits_tokens,
        overflow_risk=policy.overflow_risk,
        safety_share=policy.safety_share,
        unsure_ratio=policy.unsure_ratio,
        growth=policy.growth,
        tenant_share=policy.tenant_share,
        max_copy_tokens=policy.max_copy_tokens,
        tenants=tenants_to(policy.tenants),
    )


def region_to(entry: RegionEntry) -> pb.Region:
    """Return the message of an entry of the books."""
    return pb.Region(
        state=_region_state(entry),
        place=types.Place(
            handle=entry.handle,
            start_token=entry.start_token,
            length_tokens=entry.length_tokens,
        ),
        used_tokens=entry.used_tokens,
        request_id=entry.request_id,
        request_class=entry.request_class,
        max_total_tokens=entry.max_total_tokens,
        awaits_seq=entry.awaits_seq,
        shareable_tokens=entry.shareable_tokens,
    )


def _region_state(entry: RegionEntry) -> pb.RegionState.ValueType:
    if entry.kept:
        return pb.REGION_STATE_KEPT
    return pb.REGION_STATE_LIVE if entry.live else pb.REGION_STATE_AWAITING_COMPLETION


def _summary_to(view: View, report: ArenaReport) -> pb.PoolSummary:
    spec = view.pool.spec
    return pb.PoolSummary(
        pool=types.PoolRef(name=spec.name, epoch=report.last_epoch),
        state=_state(view) if report.epoch else pb.POOL_STATE_CLOSED,
        capacity_tokens=spec.capacity_tokens,
        free_tokens=report.free_tokens,
        regions=report.live,
        policy=view.pool.policy().name,
        idle_seconds=view.idle_seconds,
    )


def _state(view: View) -> pb.PoolState.ValueType:
    stale = view.idle_seconds > view.pool.spec.ttl_seconds
    return pb.POOL_STATE_STALE if stale else pb.POOL_STATE_OPEN


def _counters_to(counters: Counters) -> pb.Counters:
    return pb.Counters(**counters._asdict())


def _reuse_to(reuse: Reuse) -> pb.ReuseReport:
    return pb.ReuseReport(**reuse._asdict(), reused_tokens=reuse.reused_tokens)


def _tenant_to(use: TenantUse) -> pb.TenantReport:
    return pb.TenantReport(**use._asdict(), borrowed_tokens=use.borrowed_tokens)


def _buckets(pool: Pool, limits: Sequence[int]) -> list[pb.BucketUse]:
    return [
        pb.BucketUse(limit_tokens=limit, regions=count)
        for limit, count in zip(limits, pool.bucket_regions(limits), strict=True)
    ]


def _class_to(history: ClassHistory, learner: Learner) -> pb.ClassReport:
    fares = learner.coverage(history.request_class)
    return pb.ClassReport(
        request_class=history.request_class,
        finished=float(history.histogram.output_finished.sum()),
        hit_limit=float(history.histogram.output_censored.sum()),
        output_quantiles_tokens=history.output_quantiles or (),
        basis=BASES[fares.source],
        predicted=fares.coverage.known,
        covered=fares.coverage.covered,
        target_coverage=fares.coverage.target,
    )


def _bins(upper: NDArray[np.uint32], finished: Weights, censored: Weights) -> Iterator[pb.Bin]:
    for i in np.flatnonzero(finished + censored):
        yield pb.Bin(upper_tokens=int(upper[i]), finished=finished[i], hit_limit=censored[i])
