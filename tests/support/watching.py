"""A service that keeps few events, and what its watchers are told."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

from odma_service.rpc.v1 import pool_service_pb2 as pb
from odma_service.rpc.v1.pool_service_pb2_grpc import add_PoolServiceServicer_to_server
from odma_service.service.pools.registry import Registry
from odma_service.service.rpc.pools import PoolService
from odma_service.service.watch.events import Events
from odma_service.service.watch.telemetry import Telemetry


def kinds(answers) -> list[str]:
    names = (pb.EventKind.Name(answer.event.kind) for answer in answers)
    return [name.removeprefix("EVENT_KIND_") for name in names]


@contextmanager
def small_service(tmp_path, kept: int):
    """Serve a registry that keeps few events."""
    registry = Registry(
        tmp_path,
        max_pools=4,
        max_owner_pools=4,
        boot_id="boot",
        monotonic=lambda: 0.0,
        wall=lambda: 0.0,
        telemetry=Telemetry(Events(kept=kept)),
    )
    server = grpc.server(ThreadPoolExecutor(2))
    service = PoolService(registry)
    add_PoolServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield registry.telemetry, f"127.0.0.1:{port}"
    finally:
        registry.telemetry.events.end()
        server.stop(0).wait()
        service.watchers.close()
        registry.close()
