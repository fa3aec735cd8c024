"""What the owner of a pool says at first and has to remember, however its calls are made."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeVar, cast

from odma_service.client.failures import NOT_BEGUN
from odma_service.errors import FencedError, LateError, OdmaError, UnavailableError
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.values import Batch, Moves, Op, PlaneGroup, PolicyChange, Used
from odma_service.wire import batch_to, change_to, planes_to

Answered = TypeVar("Answered")


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
    granule_tokens: int = 0,
    reads_two_runs: bool = False,
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
        granule_tokens=granule_tokens,
        reads_two_runs=reads_two_runs,
    )
    if capacity_tokens is not None:
        request.capacity_tokens = capacity_tokens
    if capacity_bytes is not None:
        request.capacity_bytes = capacity_bytes
    return request


class Instance:
    """This process, or a part of it, as OpenPool tells it from others."""

    def __init__(self) -> None:
        self._instance = secrets.token_bytes(16)
        self._attempts = count(1)

    def asks(self, open_pool: Callable[..., Answered]) -> Callable[..., Answered]:
        """Return OpenPool in a form that counts how many times it is sent."""

        def ask(request: pb.OpenPoolRequest, **options: Any) -> Answered:
            request.instance, request.attempt = self._instance, next(self._attempts)
            return open_pool(request, **options)

        return ask


class Owner:
    """One epoch of a pool, how far its batches are, and the numbers of what it sends."""

    def __init__(self, response: pb.OpenPoolResponse) -> None:
        self.response = response
        self.ref = types.PoolRef()
        self.ref.CopyFrom(response.pool)
        """As all that is sent says it; its `number` is that of the last message."""
        self.fenced: FencedError | None = None
        """Another instance owns the pool. Nothing is sent any more."""
        self.seq = 0
        """Last answered batch."""
        self.completed_seq = 0
        """As the last batch promised."""
        self.pending: pb.ApplyRequest | None = None
        """A batch without an answer: it was done, or not, or there was no room for the call."""

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
        self.insist_answered()
        if completed_seq is None:
            completed_seq = self.completed_seq
        batch = Batch(
            self.seq + 1, completed_seq, list(used), list(ops), max_copy_tokens, pass_refused
        )
        self.pending = batch_to(self.numbered(), batch)

    def insist_answered(self) -> None:
        """Raise OdmaError while a batch has no answer."""
        if self.pending is not None:
            raise OdmaError(f"batch {self.pending.seq} has no answer yet; resume it first")

    def numbered(self) -> types.PoolRef:
        """Return what the next message says of the pool. A service of old numbers nothing."""
        if self.ref.owner:
            self.ref.number += 1
        return self.ref

    @contextmanager
    def sending(self, request: Any) -> Iterator[None]:
        """Send a message in this context, once more if it comes to its end with LateError.

        Then the message was refused before, and that answer was lost: only this owner has
        higher numbers. It gets the next one. Raises FencedError once another instance owns
        the pool.
        """
        if self.fenced is not None:
            raise FencedError(self.fenced.name, self.fenced.owner)
        try:
            yield
        except FencedError as error:
            self.fenced = error
            raise
        except LateError as late:
            if late.last < request.pool.number:
                raise
            self.ref.number = max(self.ref.number, late.last)
            request.pool.CopyFrom(self.numbered())

    def reconcile_request(
        self, handles: Sequence[int], completed_seq: int | None
    ) -> pb.ReconcileRequest:
        """Return what reconciles. Raises OdmaError if handles are listed while a batch waits."""
        if handles:
            self.insist_answered()
        return pb.ReconcileRequest(
            pool=self.numbered(),
            handles=handles,
            completed_seq=self.seq if completed_seq is None else completed_seq,
        )

    @contextmanager
    def waiting(self) -> Iterator[pb.ApplyRequest]:
        """Yield the batch without an answer; it has one when the context ends without an error.

        An error that is an answer to the batch makes room for another. Raises OdmaError if there
        is no such batch.
        """
        request = self.pending
        if request is None:
            raise OdmaError(f"batch {self.seq} was answered; there is nothing to resume")
        try:
            yield request
        except (UnavailableError, *NOT_BEGUN):
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
