"""What the owner of a pool says at first and has to remember, however its calls are made."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

from odma_service.errors import OdmaError, UnavailableError
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.values import Batch, Moves, Op, PlaneGroup, PolicyChange, Used
from odma_service.wire import batch_to, change_to, planes_to


def open_request(
    name: str,
    *,
    moves: Moves,
    planes: Iterable[PlaneGroup] = (),
    config_json: str | None = None,
    tensor_parallel: int = 0,
    element_bytes: int = 0,
    pipeline_parallel: int = 0,
    pipeline_rank: int = 0,
    pipeline_layers: Iterable[int] = (),
    mtp: bool = False,
    capacity_tokens: int | None = None,
    capacity_bytes: int | None = None,
    preset: str = "",
    bandwidth_bytes_per_second: float | None = None,
    descriptor_seconds: float | None = None,
    model_length_tokens: int = 0,
    block_tokens: int = 0,
    ttl_seconds: int = 0,
    retention_seconds: int = 0,
    single_ordered_stream: bool = False,
    copies_may_overlap: bool = False,
    policy: PolicyChange | None = None,
    take_over: bool = False,
    max_regions: int = 0,
    open_id: str | None = None,
) -> pb.OpenPoolRequest:
    """Return what opens a pool. Zeros and None mean the defaults of OpenPoolRequest.

    A token is made of `planes`, or of what a model's config.json says, of whose cache this is
    one of `tensor_parallel` ranks; `pipeline_rank` has the layers of one of `pipeline_parallel`.
    """
    groups = planes_to(planes)
    request = pb.OpenPoolRequest(
        open_id=uuid.uuid4().hex if open_id is None else open_id,
        name=name,
        device=types.Device(
            preset=preset,
            bandwidth_bytes_per_second=bandwidth_bytes_per_second,
            descriptor_seconds=descriptor_seconds,
        ),
        geometry=types.Geometry(planes=groups) if groups else None,
        model=None
        if config_json is None
        else types.ModelConfig(
            config_json=config_json,
            tensor_parallel=tensor_parallel,
            element_bytes=element_bytes,
            pipeline_parallel=pipeline_parallel,
            pipeline_rank=pipeline_rank,
            pipeline_layers=pipeline_layers,
            mtp=mtp,
        ),
        model_length_tokens=model_length_tokens,
        block_tokens=block_tokens,
        ttl_seconds=ttl_seconds,
        retention_seconds=retention_seconds,
        moves=cast("types.Moves.ValueType", moves),
        single_ordered_stream=single_ordered_stream,
        copies_may_overlap=copies_may_overlap,
        policy=None if policy is None else change_to(policy),
        take_over=take_over,
        max_regions=max_regions,
    )
    if capacity_tokens is not None:
        request.capacity_tokens = capacity_tokens
    if capacity_bytes is not None:
        request.capacity_bytes = capacity_bytes
    return request


class Owner:
    """One epoch of a pool, and how far its batches are."""

    def __init__(self, response: pb.OpenPoolResponse) -> None:
        self.response = response
        self.ref = response.pool
        self.seq = 0
        """Last answered batch."""
        self.completed_seq = 0
        """As the last batch promised."""
        self.pending: pb.ApplyRequest | None = None
        """A batch without an answer: the service may or may not have done it."""

    def prepare(
        self,
        used: Iterable[Used],
        ops: Iterable[Op],
        completed_seq: int | None,
        max_copy_tokens: int | None,
        *,
        pass_refused: bool,
    ) -> None:
        """Make the next batch. Raises OdmaError while one has no answer."""
        if self.pending is not None:
            raise OdmaError(f"batch {self.pending.seq} has no answer yet; resume it first")
        if completed_seq is None:
            completed_seq = self.completed_seq
        batch = Batch(
            self.seq + 1, completed_seq, list(used), list(ops), max_copy_tokens, pass_refused
        )
        self.pending = batch_to(self.ref, batch)

    @contextmanager
    def waiting(self) -> Iterator[pb.ApplyRequest]:
        """Yield the batch without an answer; it has one when the context ends without an error.

        An error that says that the batch was not done makes room for another. Raises OdmaError
        if there is no such batch.
        """
        request = self.pending
        if request is None:
            raise OdmaError(f"batch {self.seq} was answered; there is nothing to resume")
        try:
            yield request
        except UnavailableError:
            raise
        except OdmaError:
            self.pending = None
            raise
        self.pending = None
        self.seq = request.seq
        self.completed_seq = request.completed_seq

    def reconciled(self, answer: pb.ReconcileResponse) -> None:
        """Go on after the last answered seq."""
        self.pending = None
        self.seq = self.completed_seq = answer.last_seq
