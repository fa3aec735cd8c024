"""MemoryService: OpenPool, Apply and the other calls of a pool's owner."""

from __future__ import annotations

import grpc

from odma_service.errors import InvalidError
from odma_service.learning import LimitsReport, Question, predictions_of
from odma_service.pool import PoolSpec
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.rpc.v1.memory_service_pb2_grpc import MemoryServiceServicer
from odma_service.service.door.streams import Streams
from odma_service.service.pools.registry import Opened, Registry
from odma_service.service.rpc.names import ref_from
from odma_service.service.rpc.opening import changed_policy, first_policy, spec_from
from odma_service.service.rpc.reports import policy_to
from odma_service.service.rpc.statuses import reports_errors
from odma_service.values import Predicted
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


class MemoryService(MemoryServiceServicer):
    """What a pool's owner may call."""

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
        )
        return _opened_to(opened)

    @reports_errors
    def ClosePool(
        self, request: pb.ClosePoolRequest, context: grpc.ServicerContext
    ) -> pb.ClosePoolResponse:
        self._registry.close_epoch(*ref_from(request.pool))
        return pb.ClosePoolResponse()

    @reports_errors
    def KeepAlive(
        self, request: pb.KeepAliveRequest, context: grpc.ServicerContext
    ) -> pb.KeepAliveResponse:
        with self._registry.owned(*ref_from(request.pool)) as learner:
            spec = learner.pool.spec
        return pb.KeepAliveResponse(
            ttl_seconds=spec.ttl_seconds, retention_seconds=spec.retention_seconds
        )

    @reports_errors
    def Apply(self, request: pb.ApplyRequest, context: grpc.ServicerContext) -> pb.ApplyResponse:
        return self._apply(request)

    @property
    def Stream(self) -> Streams:  # type: ignore[override]  # a handler that carries its threads
        """Handle Stream, which answers what Apply does."""
        return self.streams

    def _apply(self, request: pb.ApplyRequest) -> pb.ApplyResponse:
        name, epoch = ref_from(request.pool)
        batch = batch_from(request)
        with self._registry.owned(name, epoch) as learner:
            question = learner.asks(batch.ops, batch.seq)
            if question is None:
                answer = learner.apply(epoch, batch)
        if question is not None:
            predictions = self._predictions(question)
            with self._registry.owned(name, epoch) as learner:
                answer = learner.apply(epoch, batch, predictions)
        return answer_to(answer)

    def _predictions(self, question: Question) -> list[Predicted | None]:
        """Ask the model, away from the lock: it takes time."""
        with self._registry.witness.spans.part("predict"):
            return predictions_of(question.answers())

    @reports_errors
    def Allocate(
        self, request: pb.AllocateRequest, context: grpc.ServicerContext
    ) -> pb.AllocateResponse:
        name, epoch = ref_from(request.pool)
        _require("allocate", request.HasField("allocate"))
        operation = allocate_from(request.allocate)
        with self._registry.owned(name, epoch) as learner:
            question = learner.asks([operation])
        predictions = None if question is None else self._predictions(question)
        with self._registry.owned(name, epoch) as learner:
            place = learner.allocate(epoch, operation, predictions)
        return pb.AllocateResponse(place=place_to(place))

    @reports_errors
    def Extend(self, request: pb.ExtendRequest, context: grpc.ServicerContext) -> pb.ExtendResponse:
        name, epoch = ref_from(request.pool)
        _require("extend", request.HasField("extend"))
        operation = extend_from(request.extend)
        with self._registry.owned(name, epoch) as learner:
            place = learner.extend(epoch, operation)
        return pb.ExtendResponse(place=place_to(place))

    @reports_errors
    def Free(self, request: pb.FreeRequest, context: grpc.ServicerContext) -> pb.FreeResponse:
        name, epoch = ref_from(request.pool)
        _require("free", request.HasField("free"))
        operation = free_from(request.free)
        with self._registry.owned(name, epoch) as learner:
            freed = learner.free(epoch, operation)
        return pb.FreeResponse(already_free=freed.already_free)

    @reports_errors
    def Reconcile(
        self, request: pb.ReconcileRequest, context: grpc.ServicerContext
    ) -> pb.ReconcileResponse:
        name, epoch = ref_from(request.pool)
        with self._registry.owned(name, epoch) as learner:
            most = learner.pool.spec.max_regions
            if len(request.handles) > most:
                raise InvalidError("handles", f"at most {most:,}, not {len(request.handles):,}")
            places, freed = learner.reconcile(epoch, request.handles)
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
        name, epoch = ref_from(request.pool)
        expected = request.expected_version if request.HasField("expected_version") else None
        with self._registry.owned(name, epoch) as learner:
            report = learner.recalibrate(request.dry_run, expected, request.limits)
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
        name, epoch = ref_from(request.pool)
        _require("policy", request.HasField("policy"))
        expected = request.expected_version if request.HasField("expected_version") else None
        with self._registry.owned(name, epoch) as learner:
            pool = learner.pool
            changed = changed_policy(change_from(request.policy), pool.policy(), pool.spec)
            learner.set_policy(changed, expected)
            policy = pool.policy()
        return pb.SetPolicyResponse(policy=policy_to(policy))


def _require(field: str, given: bool) -> None:
    if not given:
        raise InvalidError(field, "is required")


def _opened_to(opened: Opened) -> pb.OpenPoolResponse:
    spec: PoolSpec = opened.spec
    return pb.OpenPoolResponse(
        pool=types.PoolRef(name=spec.name, epoch=opened.epoch),
        capacity_tokens=spec.capacity_tokens,
        block_tokens=spec.block_tokens,
        planes=planes_to(spec.geometry.planes),
        bytes_per_token=spec.geometry.bytes_per_token,
        model_length_tokens=spec.model_length_tokens,
        max_ops=spec.max_ops,
        max_copies=spec.max_copies,
        max_regions=spec.max_regions,
        policy_version=opened.policy_version,
    )


def _limits_to(report: LimitsReport) -> pb.LimitsReport:
    return pb.LimitsReport(
        limits_tokens=report.limits_tokens,
        waste_tokens=report.waste_tokens,
        utilisation=report.utilisation,
    )
