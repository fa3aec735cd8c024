"""OpenPool and SetPolicy: requests as values, checked, with defaults filled in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from odma_service.errors import InvalidError
from odma_service.pool import MOST_CAPACITY_TOKENS, Opening, PoolSpec
from odma_service.pool.geometry import (
    MOST_MODEL_LENGTH_TOKENS,
    Device,
    Geometry,
    device,
)
from odma_service.pool.models import ModelGeometry, Parallel, from_model_config
from odma_service.pool.policy import PolicyRecord, named
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.service.rpc.names import name_from
from odma_service.values import Moves, PolicyChange
from odma_service.wire import planes_from

DEFAULT_BLOCK_TOKENS = 16
DEFAULT_TTL_SECONDS = 60
DEFAULT_RETENTION_SECONDS = 86_400
DEFAULT_MAX_REGIONS = 1024
INSTANCE_BYTES = 16


def spec_from(request: pb.OpenPoolRequest) -> PoolSpec:
    """Return the spec of a request. Raises InvalidError for the first field that breaks a rule."""
    name = name_from(request.name)
    model = _model_from(request)
    block_tokens = request.block_tokens or DEFAULT_BLOCK_TOKENS
    capacity_tokens = _capacity_from(request, model.geometry, block_tokens)
    if request.granule_tokens and model.not_of_prefix:
        raise InvalidError(
            "granule_tokens", f"0 for this model: {model.not_of_prefix}; or give the planes instead"
        )
    longest = (model.model_length_tokens, capacity_tokens, MOST_MODEL_LENGTH_TOKENS)
    return PoolSpec(
        name=name,
        open_id=request.open_id,
        geometry=model.geometry,
        capacity_tokens=capacity_tokens,
        model_length_tokens=request.model_length_tokens or min(filter(None, longest)),
        moves=_moves_from(request.moves),
        device=_device_from(request.device),
        single_ordered_stream=request.single_ordered_stream,
        copies_may_overlap=request.copies_may_overlap,
        granule_tokens=request.granule_tokens,
        reads_two_runs=request.reads_two_runs,
        block_tokens=block_tokens,
        ttl_seconds=request.ttl_seconds or DEFAULT_TTL_SECONDS,
        retention_seconds=request.retention_seconds or DEFAULT_RETENTION_SECONDS,
        max_regions=request.max_regions or DEFAULT_MAX_REGIONS,
    )


def opening_from(request: pb.OpenPoolRequest) -> Opening:
    """Return which process asks, and how often it did."""
    if len(request.instance) not in (0, INSTANCE_BYTES):
        raise InvalidError("instance", f"{INSTANCE_BYTES} random bytes, or none")
    if bool(request.instance) != bool(request.attempt):
        raise InvalidError("attempt", "1, 2, ... with an instance, 0 without")
    return Opening(request.instance.hex(), request.attempt)


def first_policy(change: PolicyChange, spec: PoolSpec) -> PolicyRecord:
    """Return the policy of a new pool."""
    moves_any, _ = spec.engine_kind
    return changed_policy(change, _named("elastic" if moves_any else "odma", spec), spec)


def _named(name: str, spec: PoolSpec) -> PolicyRecord:
    return named(
        name,
        spec.model_length_tokens,
        spec.capacity_tokens,
        slides=spec.engine_kind[1],
    )


def changed_policy(change: PolicyChange, base: PolicyRecord, spec: PoolSpec) -> PolicyRecord:
    """Return `base`, or the record that the change names, with its fields changed.

    A name stands for no tenants: those of `base` are kept.
    """
    if not change.tenants and not change.clear_tenants:
        change = change._replace(tenants=base.tenants)
    fields = change._asdict()
    with _inside("policy"):
        if name := fields.pop("name"):
            base = _named(name, spec)
        return base.with_changes(**fields)


def _model_from(request: pb.OpenPoolRequest) -> ModelGeometry:
    layout = request.WhichOneof("layout")
    if layout == "geometry":
        with _inside("geometry"):
            return ModelGeometry(_geometry_from(request.geometry, request.block_tokens), None)
    if layout == "model":
        model = request.model
        with _inside("model"):
            part = Parallel(
                model.tensor_parallel,
                model.pipeline_parallel,
                model.pipeline_rank,
                tuple(model.pipeline_layers),
                model.mtp,
            )
            return from_model_config(model.config_json, model.element_bytes, part)
    raise InvalidError("geometry", "geometry or model is required")


def _geometry_from(message: types.Geometry, block_tokens: int) -> Geometry:
    geometry = Geometry(planes_from(message.planes))
    geometry.check_alignment(block_tokens or DEFAULT_BLOCK_TOKENS)
    return geometry


def _capacity_from(request: pb.OpenPoolRequest, geometry: Geometry, block_tokens: int) -> int:
    """Return the capacity in whole blocks; one below a block as it is, for PoolSpec to refuse."""
    capacity = request.WhichOneof("capacity")
    if capacity is None:
        raise InvalidError("capacity_tokens", "capacity_tokens or capacity_bytes is required")
    if capacity == "capacity_tokens":
        return request.capacity_tokens // block_tokens * block_tokens or request.capacity_tokens
    tokens = geometry.tokens_in(request.capacity_bytes)
    if not block_tokens <= tokens <= MOST_CAPACITY_TOKENS:
        raise InvalidError(
            "capacity_bytes",
            f"room for {block_tokens:,} to {MOST_CAPACITY_TOKENS:,} tokens of "
            f"{geometry.bytes_per_token:,} bytes, not {tokens:,}",
        )
    return tokens // block_tokens * block_tokens


def _device_from(message: types.Device) -> Device:
    has = message.HasField
    with _inside("device"):
        return device(
            message.preset,
            message.bandwidth_bytes_per_second if has("bandwidth_bytes_per_second") else None,
            message.descriptor_seconds if has("descriptor_seconds") else None,
        )


def _moves_from(number: int) -> Moves:
    try:
        return Moves(number)
    except ValueError:
        raise InvalidError("moves", "MOVES_NONE, MOVES_OWN_GROWTH or MOVES_ANY") from None


@contextmanager
def _inside(field: str) -> Iterator[None]:
    """Put the name of a message's field before those of its own fields."""
    try:
        yield
    except InvalidError as error:
        raise InvalidError(f"{field}.{error.field}", error.rule) from None
