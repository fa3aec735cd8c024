"""A synchronous client: seq, retries, reconnection and typed errors.

    with Client("127.0.0.1:50051") as service:
        pool = service.open_pool("main", moves=MOVES_ANY, geometry=..., capacity_tokens=111_104)
        answer = pool.apply(ops=[allocate("request-1", prompt_tokens=700)])

A call that gets no answer (the service restarts, the network hangs) is sent again, unchanged,
until `retry_seconds` are over. The service recognises it, so its work is done once. All other
failures are raised at once, as the errors of `odma_service.errors`.

A Client may be shared between threads. A PoolClient speaks for the pool's owner and belongs to
one thread.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar, cast

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from odma_service.client.failures import LONGEST_PAUSE_SECONDS, Patience
from odma_service.client.headers import Caller, Headers
from odma_service.client.owner import Owner
from odma_service.client.streaming import ApplyStream
from odma_service.errors import OdmaError
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1 import predictor_service_pb2 as predictor_pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.rpc.v1.memory_service_pb2_grpc import MemoryServiceStub
from odma_service.rpc.v1.pool_service_pb2_grpc import PoolServiceStub
from odma_service.rpc.v1.predictor_service_pb2_grpc import PredictorServiceStub

PAGE_REGIONS = 10_000

CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    # A connection whose other end vanished is given up after 15 seconds.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)

Answer = TypeVar("Answer")


def used(handle: int, used_tokens: int, pinned: bool = False) -> pb.Used:
    """Say how much of a region is written, all enqueued work included."""
    return pb.Used(handle=handle, used_tokens=used_tokens, pinned=pinned)


def free(handle: int, end: int, output_tokens: int = 0) -> pb.Op:
    """Give a region back; `end` is an End, `output_tokens` all that was generated."""
    end_value = cast("pb.End.ValueType", end)
    return pb.Op(free=pb.Freeing(handle=handle, end=end_value, output_tokens=output_tokens))


def trim(handle: int, to_tokens: int) -> pb.Op:
    """Give back the end of a region."""
    return pb.Op(trim=pb.Trim(handle=handle, to_tokens=to_tokens))


def extend(handle: int, least_tokens: int, want_tokens: int = 0) -> pb.Op:
    """Ask for more room; lengths are totals, want_tokens 0 lets the policy decide."""
    return pb.Op(
        extend=pb.Extend(handle=handle, least_tokens=least_tokens, want_tokens=want_tokens)
    )


def allocate(
    request_id: str,
    prompt_tokens: int,
    *,
    generated_tokens: int = 0,
    max_total_tokens: int | None = None,
    request_class: str = "",
    tenant: str = "",
    overflow_risk: float | None = None,
    predicted_output_tokens: int | None = None,
    text: str | None = None,
) -> pb.Op:
    """Ask for a region for one request. None leaves the choice to the service."""
    return pb.Op(
        allocate=pb.Alloc(
            request_id=request_id,
            prompt_tokens=prompt_tokens,
            generated_tokens=generated_tokens,
            max_total_tokens=max_total_tokens,
            request_class=request_class,
            tenant=tenant,
            overflow_risk=overflow_risk,
            predicted_output_tokens=predicted_output_tokens,
            text=text,
        )
    )


def open_request(
    name: str,
    *,
    moves: int,
    geometry: types.Geometry | None = None,
    model: types.ModelConfig | None = None,
    capacity_tokens: int | None = None,
    capacity_bytes: int | None = None,
    device: types.Device | None = None,
    model_length_tokens: int = 0,
    block_tokens: int = 0,
    ttl_seconds: int = 0,
    retention_seconds: int = 0,
    single_ordered_stream: bool = False,
    copies_may_overlap: bool = False,
    policy: types.PolicyChange | None = None,
    take_over: bool = False,
    max_regions: int = 0,
    open_id: str | None = None,
) -> pb.OpenPoolRequest:
    """Return what opens a pool. Zeros and None mean the defaults of OpenPoolRequest."""
    request = pb.OpenPoolRequest(
        open_id=uuid.uuid4().hex if open_id is None else open_id,
        name=name,
        device=device,
        geometry=geometry,
        model=model,
        model_length_tokens=model_length_tokens,
        block_tokens=block_tokens,
        ttl_seconds=ttl_seconds,
        retention_seconds=retention_seconds,
        moves=cast("types.Moves.ValueType", moves),
        single_ordered_stream=single_ordered_stream,
        copies_may_overlap=copies_may_overlap,
        policy=policy,
        take_over=take_over,
        max_regions=max_regions,
    )
    if capacity_tokens is not None:
        request.capacity_tokens = capacity_tokens
    if capacity_bytes is not None:
        request.capacity_bytes = capacity_bytes
    return request


class Tls(NamedTuple):
    """PEM files of a connection with TLS. No ca: the authorities that gRPC knows.

    `cert` and `key` show who the client is, to a service that asks for it.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Return the files' contents. Raises OdmaError for a file that cannot be read."""
        try:
            ca, cert, key = (path.read_bytes() if path else None for path in self)
        except OSError as error:
            raise OdmaError(f"cannot read {error.filename}: {error.strerror}") from None
        return grpc.ssl_channel_credentials(ca, key, cert)


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
        self._caller = Caller(token)
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
        else, which also finds the seq. Raises PoolOwnedError, PoolLimitError, InvalidError.
        """
        request = open_request(name, **fields)
        return PoolClient(self, self.call(self.memory.OpenPool, request))

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

    def is_serving(self, service: str = "") -> bool:
        """Ask the standard health service once. Raises UnavailableError."""
        request = health_pb2.HealthCheckRequest(service=service)
        answer = self.call(self._health.Check, request, retry=False)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def call(
        self, method: Callable[..., Answer], request: Message, *, retry: bool = True
    ) -> Answer:
        """Return the answer to `request`, sent again unchanged while nobody answers."""
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
        used: Iterable[pb.Used] = (),
        ops: Iterable[pb.Op] = (),
        *,
        completed_seq: int | None = None,
        max_copy_tokens: int | None = None,
        pass_refused: bool = False,
    ) -> pb.ApplyResponse:
        """Do one decode step's operations, once. completed_seq None: as the last batch said.

        Raises EpochError if the epoch is over and InvalidError for a bad batch, which is then
        not done. After an UnavailableError call resume(), not apply().
        """
        self.prepare(used, ops, completed_seq, max_copy_tokens, pass_refused=pass_refused)
        return self.resume()

    def resume(self) -> pb.ApplyResponse:
        """Send the batch without an answer again, and return its answer."""
        with self.waiting() as request:
            return self._client.call(self._stream or self._client.memory.Apply, request)

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
        return self._client.call(self._client.memory.KeepAlive, pb.KeepAliveRequest(pool=self.ref))

    def allocate(self, request_id: str, prompt_tokens: int, **fields: Any) -> types.Place:
        """Take one region; `fields` as allocate() of this module.

        Raises RefusedError, and InvalidError for what can never fit.
        """
        operation = allocate(request_id, prompt_tokens, **fields).allocate
        request = pb.AllocateRequest(pool=self.ref, allocate=operation)
        return self._client.call(self._client.memory.Allocate, request).place

    def extend(self, handle: int, least_tokens: int, want_tokens: int = 0) -> types.Place:
        """Grow a region in place. Raises RefusedError, and HandleError if it is dead."""
        operation = extend(handle, least_tokens, want_tokens).extend
        request = pb.ExtendRequest(pool=self.ref, extend=operation)
        return self._client.call(self._client.memory.Extend, request).place

    def free(self, handle: int, end: int, output_tokens: int = 0) -> bool:
        """Give a region back; return whether it had been given back before."""
        operation = free(handle, end, output_tokens).free
        request = pb.FreeRequest(pool=self.ref, free=operation)
        return self._client.call(self._client.memory.Free, request).already_free

    def reconcile(self, handles: Sequence[int]) -> pb.ReconcileResponse:
        """Free every region that is not listed, and go on after the last answered seq."""
        request = pb.ReconcileRequest(pool=self.ref, handles=handles)
        answer = self._client.call(self._client.memory.Reconcile, request)
        self.reconciled(answer)
        return answer

    def recalibrate(
        self, *, dry_run: bool = False, expected_version: int | None = None, limits: int = 0
    ) -> pb.RecalibrateResponse:
        """Find the bucket limits that would have cost least. Sent once.

        After an UnavailableError read the pool's policy version before trying again.
        """
        request = pb.RecalibrateRequest(
            pool=self.ref, dry_run=dry_run, expected_version=expected_version, limits=limits
        )
        return self._client.call(self._client.memory.Recalibrate, request, retry=False)

    def set_policy(
        self, policy: types.PolicyChange, *, expected_version: int | None = None
    ) -> types.Policy:
        """Change the policy record. Sent once, as recalibrate() is."""
        request = pb.SetPolicyRequest(
            pool=self.ref, policy=policy, expected_version=expected_version
        )
        return self._client.call(self._client.memory.SetPolicy, request, retry=False).policy

    def close_pool(self) -> None:
        """End the epoch. Promises that no enqueued work uses the pool's memory."""
        self._client.call(self._client.memory.ClosePool, pb.ClosePoolRequest(pool=self.ref))
