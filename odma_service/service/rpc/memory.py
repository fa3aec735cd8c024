"""MemoryService: OpenPool, Apply and the other calls of a pool's owner."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import grpc

from odma_service.errors import InvalidError, NotCompletedError
from odma_service.learning import Learner, LimitsReport, Question, predictions_of
from odma_service.pool import PoolSpec
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.rpc.v1.memory_service_pb2_grpc import MemoryServiceServicer
from odma_service.service.door.access import acts_as_operator
from odma_service.service.door.streams import Streams
from odma_service.service.pools.registry import Opened, Registry
from odma_service.service.rpc.names import ref_from, unnumbered_ref_from
from odma_service.service.rpc.opening import (
    changed_policy,
    first_policy,
    opening_from,
    spec_from,
)
from odma_service.service.rpc.reports import policy_to
from odma_service.service.rpc.statuses import reports_errors
from odma_service.values import Answer, Caller, Place, Predicted
from odma_service.wire import (
    allocate_from,
    answer_to,
    batch_from,
    change_from,
    extend_from,
    free_from,
    place_to,
    planes_to,
)

Decided = TypeVar("Decided", Answer, Place)


class MemoryService(MemoryServiceServicer):
    """The calls of a pool's owner."""

    def __init__(self, registry: Registry, most_streams: int) -> None:
        self._registry = registry
        self.streams = Streams(self._apply, most_streams)

    @reports_errors
    def OpenPool(
        self, request: pb.OpenPoolRequest, context: grpc.ServicerContext
    ) -> pb.OpenPoolResponse:
        spec = spec_from(request)
        opened = self._registry.open(
            spec,
            first_policy(change_from(request.policy), spec),
            keep_policy=not request.HasField("policy"),
            take_over=request.take_over,
            opening=opening_from(request),
            seen=request.seen if request.HasField("seen") else None,
        )
        return _opened_to(opened)

    @reports_errors
    def ClosePool(
        self, request: pb.ClosePoolRequest, context: grpc.ServicerContext
    ) -> pb.ClosePoolResponse:
        by_operator = acts_as_operator(request.by_operator, "ClosePool")
        self._registry.close_epoch(*ref_from(request.pool), by_operator=by_operator)
        return pb.ClosePoolResponse()

    @reports_errors
    def KeepAlive(
        self, request: pb.KeepAliveRequest, context: grpc.ServicerContext
    ) -> pb.KeepAliveResponse:
        with self._registry.owned(*unnumbered_ref_from(request.pool), context.is_active) as learner:
            spec = learner.pool.spec
        return pb.KeepAliveResponse(
            ttl_seconds=spec.ttl_seconds, retention_seconds=spec.retention_seconds
        )

    @reports_errors
    def Apply(self, request: pb.ApplyRequest, context: grpc.ServicerContext) -> pb.ApplyResponse:
        return self._apply(request, context.is_active)

    @property
    def Stream(self) -> Streams:  # type: ignore[override]  # see door/handlers.py
        """Handle Stream: each answer is that of Apply."""
        return self.streams

    def _apply(self, request: pb.ApplyRequest, wanted: Callable[[], bool]) -> pb.ApplyResponse:
        name, caller = ref_from(request.pool)
        batch = batch_from(request)
        return answer_to(
            self._decide(
                name,
                caller,
                wanted,
                lambda learner: learner.asks(batch.ops, batch.seq),
                lambda learner, predictions: learner.apply(caller, batch, predictions),
            )
        )

    def _decide(
        self,
        name: str,
        caller: Caller,
        wanted: Callable[[], bool],
        asks: Callable[[Learner], Question | None],
        do: Callable[[Learner, list[Predicted | None] | None], Decided],
    ) -> Decided:
        """Do what an owner asks. A model is asked without the lock: it takes time."""
        with self._registry.owned(name, caller, wanted) as learner:
            question = asks(learner)
            if question is None:
                return do(learner, None)
        with self._registry.telemetry.spans.part("predict"):
            predictions = predictions_of(question.answers())
        with self._registry.owned(name, caller, wanted) as learner:
            return do(learner, predictions)

    @reports_errors
    def Allocate(
        self, request: pb.AllocateRequest, context: grpc.ServicerContext
    ) -> pb.AllocateResponse:
        name, caller = ref_from(request.pool)
        _require("allocate", request.HasField("allocate"))
        operation = allocate_from(request.allocate)
        place = self._decide(
            name,
            caller,
            context.is_active,
            lambda learner: learner.asks([operation]),
            lambda learner, predictions: learner.allocate(caller, operation, predictions),
        )
        return pb.AllocateResponse(place=place_to(place))

    @reports_errors
    def Extend(self, request: pb.ExtendRequest, context: grpc.ServicerContext) -> pb.ExtendResponse:
        name, caller = ref_from(request.pool)
        _require("extend", request.HasField("extend"))
        operation = extend_from(request.extend)
        with self._registry.owned(name, caller, context.is_active) as learner:
            place = learner.extend(caller, operation)
        return pb.ExtendResponse(place=place_to(place))

    @reports_errors
    def Free(self, request: pb.FreeRequest, context: grpc.ServicerContext) -> pb.FreeResponse:
        name, caller = ref_from(request.pool)
        _require("free", request.HasField("free"))
        operation = free_from(request.free)
        with self._registry.owned(name, caller, context.is_active) as learner:
            freed = learner.free(caller, operation)
        return pb.FreeResponse(already_free=freed.already_free)

    @reports_errors
    def Reconcile(
        self, request: pb.ReconcileRequest, context: grpc.ServicerContext
    ) -> pb.ReconcileResponse:
        name, caller = ref_from(request.pool)
        with self._registry.owned(name, caller, context.is_active) as learner:
            most = learner.pool.spec.max_regions
            if len(request.handles) > most:
                raise InvalidError("handles", f"at most {most:,}, not {len(request.handles):,}")
            _insist_completed(request, learner.pool.last_seq)
            places, freed = learner.reconcile(caller, request.handles, request.completed_seq)
            last_seq = learner.pool.last_seq
        return pb.ReconcileResponse(
            kept=[place_to(place) for place in places if place.length_tokens],
            unknown=[place.handle for place in places if not place.length_tokens],
            freed=freed,
            last_seq=last_seq,
        )

    @reports_errors
    def Recalibrate(
        self, request: pb.RecalibrateRequest, context: grpc.ServicerContext
    ) -> pb.RecalibrateResponse:
        fence, expected = _fence_of(request, request.dry_run)
        with self._steered(request.pool, fence, context.is_active) as learner:
            report = learner.recalibrate(request.dry_run, expected, request.limits, fence)
        return pb.RecalibrateResponse(
            before=_limits_to(report.before),
            after=_limits_to(report.after),
            installed=report.installed,
            policy_version=report.policy_version,
            completions=report.completions,
        )

    @reports_errors
    def SetPolicy(
        self, request: pb.SetPolicyRequest, context: grpc.ServicerContext
    ) -> pb.SetPolicyResponse:
        _require("policy", request.HasField("policy"))
        fence, expected = _fence_of(request)
        with self._steered(request.pool, fence, context.is_active) as learner:
            pool = learner.pool
            changed = changed_policy(change_from(request.policy), pool.policy(), pool.spec)
            learner.set_policy(changed, expected, fence)
            policy = pool.policy()
        return pb.SetPolicyResponse(policy=policy_to(policy))

    def _steered(
        self, ref: types.PoolRef, fence: Caller | None, wanted: Callable[[], bool]
    ) -> AbstractContextManager[Learner]:
        """Hold a pool for a call that its owner makes, or without a fence anybody."""
        name, caller = ref_from(ref)
        if fence is None:
            return self._registry.steered(name, caller.epoch, wanted)
        return self._registry.owned(name, fence, wanted)


def _fence_of(
    request: pb.SetPolicyRequest | pb.RecalibrateRequest, changes_nothing: bool = False
) -> tuple[Caller | None, int | None]:
    """Return the caller of an owner's call, None if another fence does, and expected_version."""
    _, caller = ref_from(request.pool)
    expected = request.expected_version if request.HasField("expected_version") else None
    fenced_else = not caller.owner and (expected is not None or changes_nothing)
    return (None if fenced_else else caller), expected


def _insist_completed(request: pb.ReconcileRequest, last_seq: int) -> None:
    """Raise NotCompletedError unless the copies of all answers are promised to be done."""
    promised = request.completed_seq
    if promised > last_seq:
        raise InvalidError("completed_seq", "at most the last answered seq")
    if request.handles and promised < last_seq and (request.pool.owner or promised):
        raise NotCompletedError(promised, last_seq)


def _require(field: str, given: bool) -> None:
    if not given:
        raise InvalidError(field, "is required")


def _opened_to(opened: Opened) -> pb.OpenPoolResponse:
    spec: PoolSpec = opened.spec
    return pb.OpenPoolResponse(
        pool=types.PoolRef(name=spec.name, epoch=opened.epoch, owner=opened.owner),
        capacity_tokens=spec.capacity_tokens,
        block_tokens=spec.block_tokens,
        planes=planes_to(spec.geometry.planes),
        bytes_per_token=spec.geometry.bytes_per_token,
        model_length_tokens=spec.model_length_tokens,
        max_ops=spec.max_ops,
        max_copies=spec.max_copies,
        max_regions=spec.max_regions,
        policy_version=opened.policy_version,
        granule_tokens=spec.granule_tokens,
        reads_two_runs=spec.reads_two_runs,
        policy_name=opened.policy_name,
    )


def _limits_to(report: LimitsReport) -> pb.LimitsReport:
    return pb.LimitsReport(
        limits_tokens=report.limits_tokens,
        waste_tokens=report.waste_tokens,
        utilisation=report.utilisation,
    )
