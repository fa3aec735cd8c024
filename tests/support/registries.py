"""Registries without a server, whose clock a test sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from servers import GEOMETRY

from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.service.pools.registry import Opened, Registry
from odma_service.service.rpc.opening import first_policy, spec_from
from odma_service.values import PolicyChange


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def registry_of(
    directory: Path, clock: Clock, max_pools: int = 3, boot_id: str = "boot", **more: Any
) -> Registry:
    """Return a registry of what is in a directory."""
    return Registry(
        directory,
        max_pools=max_pools,
        max_owner_pools=max_pools,
        boot_id=boot_id,
        monotonic=clock,
        wall=clock,
        **more,
    )


def open_in(registry: Registry, name: str, *, take_over: bool = False, **fields: object) -> Opened:
    """Open a pool of 1,024 tokens, but for `fields`."""
    usual = {"open_id": name, "capacity_tokens": 1024, "moves": types.MOVES_ANY}
    spec = spec_from(pb.OpenPoolRequest(name=name, geometry=GEOMETRY, **usual | fields))
    policy = first_policy(PolicyChange(), spec)
    return registry.open(spec, policy, keep_policy=True, take_over=take_over)


def state(registry: Registry, name: str) -> tuple[int, float]:
    """Return the running epoch of a pool and for how long its owner has been silent."""
    with registry.viewed(name) as view:
        return view.pool.epoch, view.idle_seconds
