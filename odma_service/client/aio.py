"""The client for asyncio: the same calls, retries and errors.

    async with AsyncClient("127.0.0.1:50051") as service:
        pool = await service.open_pool("main", moves=Moves.ANY, planes=..., capacity_tokens=...)
        answer = await pool.apply(ops=[Allocate("request-1", prompt_tokens=700)])

A batch that is cancelled while it waits has no answer yet: resume() it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from odma_service.client.channel import CHANNEL_OPTIONS, Caller, Tls
from odma_service.client.failures import LONGEST_PAUSE_SECONDS, Patience
from odma_service.client.owner import Instance, Owner, open_request
from odma_service.client.stream import AsyncApplyStream
from odma_service.errors import StaleOpenError
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.rpc.v1.memory_service_pb2_grpc import MemoryServiceStub
from odma_service.rpc.v1.pool_service_pb2_grpc import PoolServiceStub
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


class AsyncClient:
    """As Client. Make it in the loop that uses it."""

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
            grpc.aio.secure_channel(target, tls.credentials(), options=CHANNEL_OPTIONS)
            if tls
            else grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        )
        self.memory: Any = MemoryServiceStub(self._channel)
        self._pools: Any = PoolServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def open_pool(self, name: str, **fields: Any) -> AsyncPoolClient:
        """As Client.open_pool."""
        request = open_request(name, **fields)
        request.seen = ""
        ask = self._instance.asks(self.memory.OpenPool)
        while True:
            try:
                return AsyncPoolClient(self, await self.call(ask, request))
            except StaleOpenError as stale:  # as in Client.open_pool
                request.seen = stale.seen

    async def get_pool(self, name: str) -> pool_pb.GetPoolResponse:
        """As Client.get_pool."""
        answer: pool_pb.GetPoolResponse = await self.call(
            self._pools.GetPool, pool_pb.GetPoolRequest(name=name)
        )
        return answer

    async def list_pools(self) -> pool_pb.ListPoolsResponse:
        """As Client.list_pools."""
        answer: pool_pb.ListPoolsResponse = await self.call(
            self._pools.ListPools, pool_pb.ListPoolsRequest()
        )
        return answer

    async def close_pool(self, ref: types.PoolRef) -> None:
        """As Client.close_pool, for operators."""
        request = pb.ClosePoolRequest(pool=ref, by_operator=True)
        await self.call(self.memory.ClosePool, request)

    async def forget_pool(self, ref: types.PoolRef) -> None:
        """As Client.forget_pool."""
        await self.call(self._pools.ForgetPool, pool_pb.ForgetPoolRequest(pool=ref))

    async def set_policy(
        self, ref: types.PoolRef, change: PolicyChange, *, expected_version: int
    ) -> types.Policy:
        """As Client.set_policy, for operators."""
        request = pb.SetPolicyRequest(
            pool=ref, policy=change_to(change), expected_version=expected_version
        )
        answer: pb.SetPolicyResponse = await self.call(self.memory.SetPolicy, request, retry=False)
        return answer.policy

    async def recalibrate(
        self, ref: types.PoolRef, *, expected_version: int, dry_run: bool = False, limits: int = 0
    ) -> pb.RecalibrateResponse:
        """As Client.recalibrate, for operators."""
        request = pb.RecalibrateRequest(
            pool=ref, dry_run=dry_run, expected_version=expected_version, limits=limits
        )
        answer: pb.RecalibrateResponse = await self.call(
            self.memory.Recalibrate, request, retry=False
        )
        return answer

    async def watch(
        self, name: str = "", cursor: int = 0, incarnation: str = ""
    ) -> AsyncIterator[pool_pb.WatchResponse]:
        """As Client.watch. Leave it by contextlib.aclosing(), or the stream ends some time later.

        Events are read as they are asked for: who is slow is told, by `lost`, what it missed.
        """
        request = pool_pb.WatchRequest(name=name, cursor=cursor, incarnation=incarnation)
        patience: Patience | None = None
        while True:
            stream = self._pools.Watch(request, metadata=self._caller.metadata)
            try:
                async for answer in stream:
                    request.cursor, request.incarnation = answer.cursor, answer.incarnation
                    patience = None
                    yield answer
            except grpc.RpcError as error:
                patience = patience or Patience(self._retry_seconds, LONGEST_PAUSE_SECONDS)
                await asyncio.sleep(patience.pause_after(error))
            finally:
                stream.cancel()

    async def call(
        self, method: Callable[..., Any], request: Message, *, retry: bool = True
    ) -> Any:
        """Return the answer to `request`, sent again unchanged while nobody answers or has room."""
        patience = Patience(self._retry_seconds if retry else 0.0)
        while True:
            try:
                return await method(
                    request, timeout=self._timeout_seconds, metadata=self._caller.metadata
                )
            except grpc.RpcError as error:
                await asyncio.sleep(patience.pause_after(error))


class AsyncPoolClient(Owner):
    """As PoolClient: the owner's side of one epoch. Calls of several tasks take turns."""

    def __init__(self, client: AsyncClient, response: pb.OpenPoolResponse) -> None:
        super().__init__(response)
        self._client = client
        self._turn = asyncio.Lock()
        self._stream: AsyncApplyStream | None = None

    async def apply(
        self,
        used: Iterable[Used] = (),
        ops: Iterable[Op] = (),
        *,
        completed_seq: int | None = None,
        max_copy_tokens: int | None = None,
        pass_refused: bool = False,
    ) -> Answer:
        """As PoolClient.apply, after whose errors, or a cancellation, call resume()."""
        async with self._turn:
            self.prepare(used, ops, completed_seq, max_copy_tokens, pass_refused=pass_refused)
            return await self._resume()

    async def resume(self) -> Answer:
        """Send the batch without an answer again, and return its answer."""
        async with self._turn:
            return await self._resume()

    async def _resume(self) -> Answer:
        with self.waiting() as request:
            method = self._stream or self._client.memory.Apply
            response: pb.ApplyResponse = await self._ask(method, request)
        return answer_from(response)

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[Self]:
        """As PoolClient.stream."""
        self._stream = AsyncApplyStream(self._client.memory)
        try:
            yield self
        finally:
            self._stream.close()
            self._stream = None

    async def keep_alive(self) -> pb.KeepAliveResponse:
        """As PoolClient.keep_alive. It takes no turn."""
        request = pb.KeepAliveRequest(pool=self.ref)
        answer: pb.KeepAliveResponse = await self._ask(self._client.memory.KeepAlive, request)
        return answer

    async def allocate(self, op: Allocate) -> Place:
        """As PoolClient.allocate."""
        async with self._turn:
            self.insist_answered()
            request = pb.AllocateRequest(pool=self.numbered(), allocate=op_to(op).allocate)
            answer: pb.AllocateResponse = await self._ask(self._client.memory.Allocate, request)
        return place_from(answer.place)

    async def extend(self, op: Extend) -> Place:
        """As PoolClient.extend."""
        async with self._turn:
            self.insist_answered()
            request = pb.ExtendRequest(pool=self.numbered(), extend=op_to(op).extend)
            answer: pb.ExtendResponse = await self._ask(self._client.memory.Extend, request)
        return place_from(answer.place)

    async def free(self, op: Free) -> Freed:
        """As PoolClient.free."""
        async with self._turn:
            self.insist_answered()
            request = pb.FreeRequest(pool=self.numbered(), free=op_to(op).free)
            answer: pb.FreeResponse = await self._ask(self._client.memory.Free, request)
        return Freed(answer.already_free)

    async def reconcile(
        self, handles: Sequence[int], *, completed_seq: int | None = None
    ) -> Reconciled:
        """As PoolClient.reconcile."""
        async with self._turn:
            request = self.reconcile_request(handles, completed_seq)
            answer: pb.ReconcileResponse = await self._ask(self._client.memory.Reconcile, request)
            self.reconciled(answer)
        return reconciled_from(answer)

    async def close_pool(self) -> None:
        """As PoolClient.close_pool."""
        async with self._turn:
            request = pb.ClosePoolRequest(pool=self.numbered())
            await self._ask(self._client.memory.ClosePool, request)

    async def _ask(self, method: Callable[..., Any], request: Message) -> Any:
        """As PoolClient's."""
        while True:
            with self.sending(request):
                return await self._client.call(method, request)
