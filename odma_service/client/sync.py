"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from odma_service.client.channel import CHANNEL_OPTIONS, Caller, Headers, Tls
from odma_service.client.failures import LONGEST_PAUSE_SECONDS, Patience
from odma_service.client.owner import Instance, Owner, open_request
from odma_service.client.stream import ApplyStream
from odma_service.errors import StaleOpenError
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1 import predictor_service_pb2 as predictor_pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.rpc.v1.memory_service_pb2_grpc import MemoryServiceStub
from odma_service.rpc.v1.pool_service_pb2_grpc import PoolServiceStub
from odma_service.rpc.v1.predictor_service_pb2_grpc import PredictorServiceStub
from odma_service.values import (
    Allocate,
    Answer,
    Extend,
    Free,
    Freed,
    Op,
    Place,
    PolicyChange,
    Reconciled,
    Used,
)
from odma_service.wire import (
    answer_from,
    change_to,
    op_to,
    place_from,
    reconciled_from,
)

PAGE_REGIONS = 10_000

Response = TypeVar("Response")


class Client:
    """A connection to one service, made again whenever it breaks.

    `timeout_seconds` bounds one attempt of a call, `retry_seconds` all attempts together.
    `target` is host:port or unix:/path. Without `tls` the connection is plain. `token` is sent
    with every call of this class, and so is the current OpenTelemetry span (as traceparent), if
    there is one; calls made with its stubs need `metadata` for both.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_seconds: float = 5.0,
        retry_seconds: float = 30.0,
        tls: Tls | None = None,
        token: str | None = None,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._retry_seconds = retry_seconds
        self._caller = Caller(token, target, tls)
        self._instance = Instance()
        self._channel = (
            grpc.secure_channel(target, tls.credentials(), options=CHANNEL_OPTIONS)
            if tls
            else grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        )
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self._pools = PoolServiceStub(self._channel)
        self._predictor = PredictorServiceStub(self._channel)
        self.memory = MemoryServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def metadata(self) -> Headers | None:
        """What goes along with a call made now."""
        return self._caller.metadata

    def close(self) -> None:
        """Close the connection. Pools stay as they are."""
        self._channel.close()

    def open_pool(self, name: str, **fields: Any) -> PoolClient:
        """Open a pool and own it; `fields` as open_request() has them.

        With the open_id of an earlier call, the same epoch goes on: reconcile() before anything
        else, which also finds the seq, and fences whoever had it: another Client with this
        open_id gets FencedError. Raises PoolOwnedError, PoolLimitError, InvalidError, and
        FencedError if another Client has taken the pool from this one before.
        """
        request = open_request(name, **fields)
        request.seen = ""
        ask = self._instance.asks(self.memory.OpenPool)
        while True:
            try:
                return PoolClient(self, self.call(ask, request))
            except StaleOpenError as stale:  # it was not as seen, or an answer was lost
                request.seen = stale.seen

    def list_pools(self) -> pool_pb.ListPoolsResponse:
        """Return one line about each pool."""
        return self.call(self._pools.ListPools, pool_pb.ListPoolsRequest())

    def get_pool(self, name: str) -> pool_pb.GetPoolResponse:
        """Return all about one pool. Raises PoolNotFoundError."""
        return self.call(self._pools.GetPool, pool_pb.GetPoolRequest(name=name))

    def list_regions(self, name: str) -> list[pool_pb.Region]:
        """Return the regions and vacated runs of a pool, in address order.

        Read in pages: where the owner works at the same time, they are of different moments.
        """
        request = pool_pb.ListRegionsRequest(name=name, page_size=PAGE_REGIONS)
        regions: list[pool_pb.Region] = []
        while True:
            page = self.call(self._pools.ListRegions, request)
            regions += page.regions
            if not page.HasField("next_token"):
                return regions
            request.from_token = page.next_token

    def predict(
        self, name: str, prompts: Iterable[predictor_pb.Prompt]
    ) -> predictor_pb.PredictResponse:
        """Return how long the answers to prompts will be. Raises PoolNotFoundError."""
        request = predictor_pb.PredictRequest(pool_name=name, prompts=prompts)
        return self.call(self._predictor.Predict, request)

    def watch(
        self, name: str = "", cursor: int = 0, incarnation: str = ""
    ) -> Iterator[pool_pb.WatchResponse]:
        """Yield what happens to a pool, or to all; from now on, or behind an earlier answer.

        A stream that breaks is opened again where it was, for retry_seconds. `lost` in an
        answer says that events are missing. Closing the generator ends the stream.
        """
        request = pool_pb.WatchRequest(name=name, cursor=cursor, incarnation=incarnation)
        patience: Patience | None = None
        while True:
            stream = self._pools.Watch(request, metadata=self.metadata)
            try:
                for answer in stream:
                    request.cursor, request.incarnation = answer.cursor, answer.incarnation
                    patience = None
                    yield answer
            except grpc.RpcError as error:
                patience = patience or Patience(self._retry_seconds, LONGEST_PAUSE_SECONDS)
                time.sleep(patience.pause_after(error))
            finally:
                cast("grpc.Call", stream).cancel()

    # --- for operators: of a pool that somebody else may own, named by `ref` as list_pools() and
    # get_pool() tell it

    def close_pool(self, ref: types.PoolRef) -> None:
        """End the pool's epoch, whoever owns it. Nothing may be enqueued that uses its memory.

        Raises EpochError if the pool was opened anew meanwhile, RoleError.
        """
        self.call(self.memory.ClosePool, pb.ClosePoolRequest(pool=ref, by_operator=True))

    def forget_pool(self, ref: types.PoolRef) -> None:
        """Remove a closed pool and what it has learnt; one that is gone stays gone.

        Raises PoolOpenError, and EpochError if the pool was opened anew meanwhile.
        """
        self.call(self._pools.ForgetPool, pool_pb.ForgetPoolRequest(pool=ref))

    def set_policy(
        self, ref: types.PoolRef, change: PolicyChange, *, expected_version: int
    ) -> types.Policy:
        """Change the policy record of a running epoch. Sent once, as PoolClient.set_policy()."""
        request = pb.SetPolicyRequest(
            pool=ref, policy=change_to(change), expected_version=expected_version
        )
        return self.call(self.memory.SetPolicy, request, retry=False).policy

    def recalibrate(
        self, ref: types.PoolRef, *, expected_version: int, dry_run: bool = False, limits: int = 0
    ) -> pb.RecalibrateResponse:
        """As PoolClient.recalibrate()."""
        request = pb.RecalibrateRequest(
            pool=ref, dry_run=dry_run, expected_version=expected_version, limits=limits
        )
        return self.call(self.memory.Recalibrate, request, retry=False)

    def is_serving(self, service: str = "") -> bool:
        """Ask the standard health service once. Raises UnavailableError."""
        request = health_pb2.HealthCheckRequest(service=service)
        answer = self.call(self._health.Check, request, retry=False)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def call(
        self, method: Callable[..., Response], request: Message, *, retry: bool = True
    ) -> Response:
        """Return the answer to `request`, sent again unchanged while nobody answers or has room."""
        patience = Patience(self._retry_seconds if retry else 0.0)
        while True:
            try:
                return method(request, timeout=self._timeout_seconds, metadata=self.metadata)
            except grpc.RpcError as error:
                time.sleep(patience.pause_after(error))


class PoolClient(Owner):
    """The owner's side of one epoch of a pool."""

    def __init__(self, client: Client, response: pb.OpenPoolResponse) -> None:
        super().__init__(response)
        self._client = client
        self._stream: ApplyStream | None = None

    def apply(
        self,
        used: Iterable[Used] = (),
        ops: Iterable[Op] = (),
        *,
        completed_seq: int | None = None,
        max_copy_tokens: int | None = None,
        pass_refused: bool = False,
    ) -> Answer:
        """Do one decode step's operations, once. completed_seq None: as the last batch said.

        Raises EpochError if the epoch is over and InvalidError for a bad batch, which is then
        not done. After an UnavailableError, BusyError, CallerLimitError or StreamLimitError the
        batch waits: call resume(), not apply().
        """
        self.prepare(used, ops, completed_seq, max_copy_tokens, pass_refused=pass_refused)
        return self.resume()

    def resume(self) -> Answer:
        """Send the batch without an answer again, and return its answer."""
        with self.waiting() as request:
            response = self._ask(self._stream or self._client.memory.Apply, request)
        return answer_from(response)

    @contextmanager
    def stream(self) -> Iterator[Self]:
        """Send batches over one stream while the context lasts, which takes less time.

        A stream that breaks is opened again; all else is as without. apply() may also raise
        StreamLimitError and StreamReplacedError.
        """
        with ApplyStream(self._client.memory) as stream:
            self._stream = stream
            try:
                yield self
            finally:
                self._stream = None

    def keep_alive(self) -> pb.KeepAliveResponse:
        """Tell that this owner lives, when it has nothing else to say for ttl_seconds."""
        return self._ask(self._client.memory.KeepAlive, pb.KeepAliveRequest(pool=self.ref))

    def allocate(self, op: Allocate) -> Place:
        """Take one region. Raises RefusedError, and InvalidError for what can never fit."""
        self.insist_answered()
        request = pb.AllocateRequest(pool=self.numbered(), allocate=op_to(op).allocate)
        return place_from(self._ask(self._client.memory.Allocate, request).place)

    def extend(self, op: Extend) -> Place:
        """Grow a region in place. Raises RefusedError, and HandleError if it is dead."""
        self.insist_answered()
        request = pb.ExtendRequest(pool=self.numbered(), extend=op_to(op).extend)
        return place_from(self._ask(self._client.memory.Extend, request).place)

    def free(self, op: Free) -> Freed:
        """Give a region back. Raises HandleError for a handle that was never issued."""
        self.insist_answered()
        request = pb.FreeRequest(pool=self.numbered(), free=op_to(op).free)
        return Freed(self._ask(self._client.memory.Free, request).already_free)

    def reconcile(self, handles: Sequence[int], *, completed_seq: int | None = None) -> Reconciled:
        """Free every region that is not listed, and go on after the last answered seq.

        Promises that the copies of the answers up to `completed_seq` are done; None: of all
        that this client got. Raises NotCompletedError if handles are listed and the pool has
        answered more, and OdmaError if they are listed while a batch has no answer.
        """
        request = self.reconcile_request(handles, completed_seq)
        answer = self._ask(self._client.memory.Reconcile, request)
        self.reconciled(answer)
        return reconciled_from(answer)

    def recalibrate(
        self, *, dry_run: bool = False, expected_version: int | None = None, limits: int = 0
    ) -> pb.RecalibrateResponse:
        """Find the bucket limits that would have cost least. Sent once.

        After an UnavailableError read the pool's policy version before trying again.
        """
        self.insist_answered()
        request = pb.RecalibrateRequest(
            pool=self.numbered(), dry_run=dry_run, expected_version=expected_version, limits=limits
        )
        return self._ask(self._client.memory.Recalibrate, request, retry=False)

    def set_policy(
        self, change: PolicyChange, *, expected_version: int | None = None
    ) -> types.Policy:
        """Change the policy record. Sent once, as recalibrate() is."""
        self.insist_answered()
        request = pb.SetPolicyRequest(
            pool=self.numbered(), policy=change_to(change), expected_version=expected_version
        )
        return self._ask(self._client.memory.SetPolicy, request, retry=False).policy

    def close_pool(self) -> None:
        """End the epoch. Promises that no enqueued work uses the pool's memory."""
        self._ask(self._client.memory.ClosePool, pb.ClosePoolRequest(pool=self.numbered()))

    def _ask(
        self, method: Callable[..., Response], request: Message, *, retry: bool = True
    ) -> Response:
        """Return the answer to a message of this owner. Raises FencedError."""
        while True:
            with self.sending(request):
                return self._client.call(method, request, retry=retry)
