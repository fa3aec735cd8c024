"""A bare gRPC server that parses what an engine sends and builds an answer of the same size.

    python -m lab.bench.echo STYLE [CERT KEY]

STYLE is `threads` (as the service), `asyncio`, or `executor` (asyncio, work in threads). It
prints its address. What the service takes beyond this server is what the service itself costs.
In threads it also answers whatever it does not know with an empty message: a collector of traces.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.rpc.v1.memory_service_pb2_grpc import (
    MemoryServiceServicer,
    add_MemoryServiceServicer_to_server,
)

COPIES = 2
OPTIONS = (("grpc.so_reuseport", 0),)
THREADS = 8


def answer_to(request: pb.ApplyRequest) -> pb.ApplyResponse:
    """Return a place for each operation, and two copies, which are always the same."""
    response = pb.ApplyResponse(seq=request.seq, policy_version=1)
    for _ in request.ops:
        place = response.results.add().place
        place.handle, place.start_token, place.length_tokens = 2**33, 65_536, 256
    for _ in range(COPIES):
        response.copies.add(handle=2**33, from_token=65_536, to_token=32_768, tokens=512)
    return response


def place_for(request: pb.AllocateRequest) -> pb.AllocateResponse:
    """Return a place."""
    return pb.AllocateResponse(
        place=types.Place(handle=2**33, start_token=65_536, length_tokens=256)
    )


class InThreads(MemoryServiceServicer):
    """Each call has a thread."""

    def Apply(self, request: pb.ApplyRequest, context: Any) -> pb.ApplyResponse:  # noqa: N802
        return answer_to(request)

    def Stream(  # noqa: N802
        self, request_iterator: Any, context: Any
    ) -> Iterator[pb.StreamResponse]:
        for request in request_iterator:
            yield pb.StreamResponse(apply=answer_to(request.apply))

    def Allocate(  # noqa: N802
        self, request: pb.AllocateRequest, context: Any
    ) -> pb.AllocateResponse:
        return place_for(request)


class Anything(grpc.GenericRpcHandler):
    """Takes every message of every rpc."""

    def service(self, handler_call_details: object) -> grpc.RpcMethodHandler[bytes, bytes]:
        return grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"")


class InLoop(MemoryServiceServicer):
    """All calls share one thread."""

    async def Apply(  # noqa: N802
        self, request: pb.ApplyRequest, context: Any
    ) -> pb.ApplyResponse:
        return answer_to(request)

    async def Stream(  # noqa: N802
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[pb.StreamResponse]:
        async for request in request_iterator:
            yield pb.StreamResponse(apply=answer_to(request.apply))


class InExecutor(MemoryServiceServicer):
    """One thread for the wire, and others for the work, which may then wait."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS)

    async def Apply(  # noqa: N802
        self, request: pb.ApplyRequest, context: Any
    ) -> pb.ApplyResponse:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, answer_to, request)

    async def Stream(  # noqa: N802
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[pb.StreamResponse]:
        async for request in request_iterator:
            yield pb.StreamResponse(apply=await self.Apply(request.apply, context))


def main(style: str, *pair: str) -> None:
    """Serve until killed."""
    credentials = _credentials(*map(Path, pair)) if pair else None
    if style == "threads":
        server = grpc.server(ThreadPoolExecutor(THREADS), options=OPTIONS)
        add_MemoryServiceServicer_to_server(InThreads(), server)  # type: ignore[abstract]
        server.add_generic_rpc_handlers((Anything(),))
        print(f"127.0.0.1:{_bind(server, credentials)}", flush=True)  # noqa: T201
        server.start()
        server.wait_for_termination()
    else:
        asyncio.run(_serve_in_loop(style, credentials))


async def _serve_in_loop(style: str, credentials: grpc.ServerCredentials | None) -> None:
    server = grpc.aio.server(options=OPTIONS)
    servicer = {"asyncio": InLoop, "executor": InExecutor}[style]()  # type: ignore[abstract]
    add_MemoryServiceServicer_to_server(servicer, server)
    port = _bind(server, credentials)
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)  # noqa: T201
    await server.wait_for_termination()


def _bind(server: Any, credentials: grpc.ServerCredentials | None) -> int:
    port: int = (
        server.add_secure_port("127.0.0.1:0", credentials)
        if credentials
        else server.add_insecure_port("127.0.0.1:0")
    )
    return port


def _credentials(cert: Path, key: Path) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])


if __name__ == "__main__":
    main(*sys.argv[1:])
