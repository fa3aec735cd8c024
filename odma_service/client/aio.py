"""The client for asyncio: the same calls, retries and errors.

    async with AsyncClient("127.0.0.1:50051") as service:
        pool = await service.open_pool("main", moves=MOVES_ANY, geometry=..., capacity_tokens=...)
        answer = await pool.apply(ops=[allocate("request-1", prompt_tokens=700)])

A batch that is cancelled while it waits has no answer yet: resume() it. Streams and what only
operators need are with the synchronous client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from odma_service.client import (
    CHANNEL_OPTIONS,
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    NO_ANSWER,
    Tls,
    allocate,
    error_from,
    extend,
    free,
    open_request,
)
from odma_service.client.owner import Owner
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.rpc.v1.memory_service_pb2_grpc import MemoryServiceStub
from odma_service.rpc.v1.pool_service_pb2_grpc import PoolServiceStub


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
        self._metadata = (("authorization", f"Bearer {token}"),) if token else None
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
        return AsyncPoolClient(self, await self.call(self.memory.OpenPool, request))

    async def get_pool(self, name: str) -> pool_pb.GetPoolResponse:
        """As Client.get_pool."""
        answer: pool_pb.GetPoolResponse = await self.call(
            self._pools.GetPool, pool_pb.GetPoolRequest(name=name)
        )
        return answer

    async def call(self, method: Callable[..., Any], request: Message) -> Any:
        """Return the answer to `request`, sent again unchanged while nobody answers."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._retry_seconds
        pause_seconds = FIRST_PAUSE_SECONDS
        while True:
            try:
                return await method(request, timeout=self._timeout_seconds, metadata=self._metadata)
            except grpc.RpcError as error:
                if error.code() not in NO_ANSWER or loop.time() + pause_seconds > give_up:
                    raise error_from(error) from None
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)


class AsyncPoolClient(Owner):
    """As PoolClient: the owner's side of one epoch, for one task at a time."""

    def __init__(self, client: AsyncClient, response: pb.OpenPoolResponse) -> None:
        super().__init__(response)
        self._client = client

    async def apply(
        self,
        used: Iterable[pb.Used] = (),
        ops: Iterable[pb.Op] = (),
        *,
        completed_seq: int | None = None,
        max_copy_tokens: int | None = None,
        pass_refused: bool = False,
    ) -> pb.ApplyResponse:
        """As PoolClient.apply. After an UnavailableError or a cancellation call resume()."""
        self.prepare(used, ops, completed_seq, max_copy_tokens, pass_refused=pass_refused)
        return await self.resume()

    async def resume(self) -> pb.ApplyResponse:
        """Send the batch without an answer again, and return its answer."""
        with self.waiting() as request:
            answer: pb.ApplyResponse = await self._client.call(self._client.memory.Apply, request)
        return answer

    async def keep_alive(self) -> pb.KeepAliveResponse:
        """As PoolClient.keep_alive."""
        request = pb.KeepAliveRequest(pool=self.ref)
        answer: pb.KeepAliveResponse = await self._client.call(
            self._client.memory.KeepAlive, request
        )
        return answer

    async def allocate(self, request_id: str, prompt_tokens: int, **fields: Any) -> types.Place:
        """As PoolClient.allocate."""
        operation = allocate(request_id, prompt_tokens, **fields).allocate
        request = pb.AllocateRequest(pool=self.ref, allocate=operation)
        answer: pb.AllocateResponse = await self._client.call(self._client.memory.Allocate, request)
        return answer.place

    async def extend(self, handle: int, least_tokens: int, want_tokens: int = 0) -> types.Place:
        """As PoolClient.extend."""
        operation = extend(handle, least_tokens, want_tokens).extend
        request = pb.ExtendRequest(pool=self.ref, extend=operation)
        answer: pb.ExtendResponse = await self._client.call(self._client.memory.Extend, request)
        return answer.place

    async def free(self, handle: int, end: int, output_tokens: int = 0) -> bool:
        """As PoolClient.free."""
        request = pb.FreeRequest(pool=self.ref, free=free(handle, end, output_tokens).free)
        answer: pb.FreeResponse = await self._client.call(self._client.memory.Free, request)
        return answer.already_free

    async def reconcile(self, handles: Sequence[int]) -> pb.ReconcileResponse:
        """As PoolClient.reconcile."""
        request = pb.ReconcileRequest(pool=self.ref, handles=handles)
        answer: pb.ReconcileResponse = await self._client.call(
            self._client.memory.Reconcile, request
        )
        self.reconciled(answer)
        return answer

    async def close_pool(self) -> None:
        """As PoolClient.close_pool."""
        await self._client.call(self._client.memory.ClosePool, pb.ClosePoolRequest(pool=self.ref))
