"""PoolService: the pools and their state."""

from __future__ import annotations

import grpc

from odma_service.errors import InvalidError, PoolNotFoundError
from odma_service.rpc.v1 import pool_service_pb2 as pb
from odma_service.rpc.v1.pool_service_pb2_grpc import PoolServiceServicer
from odma_service.service.door.watchers import Watchers
from odma_service.service.pools.registry import Registry
from odma_service.service.rpc.names import name_from, unnumbered_ref_from
from odma_service.service.rpc.reports import pool_to, region_to, summary_to
from odma_service.service.rpc.statuses import reports_errors

DEFAULT_PAGE_REGIONS = 1_000
LARGEST_PAGE_REGIONS = 10_000
LARGEST_PAGE_BYTES = 256 * 1024
REGION_FRAME_BYTES = 3


class PoolService(PoolServiceServicer):
    """The calls that read, which every role may make, and ForgetPool."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.watchers = Watchers(registry.telemetry.events)

    @property
    def Watch(self) -> Watchers:  # see door/handlers.py
        """Handle Watch."""
        return self.watchers

    @reports_errors
    def ListPools(
        self, request: pb.ListPoolsRequest, context: grpc.ServicerContext
    ) -> pb.ListPoolsResponse:
        response = pb.ListPoolsResponse()
        for name in self._registry.names():
            try:
                with self._registry.viewed(name) as view:
                    response.pools.append(summary_to(view))
            except PoolNotFoundError:
                continue  # gone since
        return response

    @reports_errors
    def ForgetPool(
        self, request: pb.ForgetPoolRequest, context: grpc.ServicerContext
    ) -> pb.ForgetPoolResponse:
        name, caller = unnumbered_ref_from(request.pool)
        self._registry.forget(name, caller.epoch)
        return pb.ForgetPoolResponse()

    @reports_errors
    def GetPool(
        self, request: pb.GetPoolRequest, context: grpc.ServicerContext
    ) -> pb.GetPoolResponse:
        with self._registry.viewed(name_from(request.name)) as view:
            return pool_to(view)

    @reports_errors
    def ListRegions(
        self, request: pb.ListRegionsRequest, context: grpc.ServicerContext
    ) -> pb.ListRegionsResponse:
        name, size = name_from(request.name), request.page_size or DEFAULT_PAGE_REGIONS
        if size > LARGEST_PAGE_REGIONS:
            raise InvalidError("page_size", f"at most {LARGEST_PAGE_REGIONS:,}, not {size:,}")
        with self._registry.viewed(name) as view:
            entries = view.pool.regions(request.from_token, size + 1)
        regions: list[pb.Region] = []
        room = LARGEST_PAGE_BYTES
        for entry in entries[:size]:
            region = region_to(entry)
            room -= region.ByteSize() + REGION_FRAME_BYTES
            if room < 0 and regions:
                break
            regions.append(region)
        rest = entries[len(regions) :]
        return pb.ListRegionsResponse(
            regions=regions, next_token=rest[0].start_token if rest else None
        )
