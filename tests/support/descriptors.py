"""Every rpc of the proto files, and how to call one that only its descriptor is known of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from odma_service.client import Tls
from odma_service.rpc.v1 import emulator_service_pb2 as emulator_pb
from odma_service.rpc.v1 import memory_service_pb2 as memory_pb
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1 import predictor_service_pb2 as predictor_pb
from odma_service.rpc.v1 import types_pb2 as types

FILES = (memory_pb, pool_pb, predictor_pb, emulator_pb)
RPCS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
GEOMETRIES = [
    types.Geometry(planes=[types.PlaneGroup(count=2, bytes_per_token=64)]),
    types.Geometry(planes=[types.PlaneGroup(count=56, bytes_per_token=1024, alignment_bytes=64)]),
]
POOL_NAMES = {"name", "pool_name"}
SECONDS = 30


PLAIN: dict[str, Message] = {
    "Apply": memory_pb.ApplyRequest(seq=1),
    "Stream": memory_pb.StreamRequest(apply=memory_pb.ApplyRequest(seq=1)),
    "Allocate": memory_pb.AllocateRequest(
        allocate=memory_pb.Alloc(request_id="r", prompt_tokens=1)
    ),
    "Extend": memory_pb.ExtendRequest(extend=memory_pb.Extend(handle=1, least_tokens=1)),
    "Free": memory_pb.FreeRequest(free=memory_pb.Freeing(handle=1, end=memory_pb.END_FINISHED)),
    "SetPolicy": memory_pb.SetPolicyRequest(policy=types.PolicyChange(growth=2)),
    "Predict": predictor_pb.PredictRequest(prompts=[predictor_pb.Prompt(prompt_tokens=1)]),
}
"""The shortest request of an rpc that is not refused for its fields, where empty is not one."""


def pool_names_of(message: Descriptor) -> list[tuple[str, ...]]:
    """Return the paths of the fields of a request that name a pool."""
    return list(_paths(message, ()))


def _paths(message: Descriptor, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for field in message.fields:
        here = (*path, field.name)
        if field.type == FieldDescriptor.TYPE_MESSAGE and not field.is_repeated:
            if field.message_type is types.PoolRef.DESCRIPTOR:
                yield here
            elif field.message_type.name.endswith("Request"):
                yield from _paths(field.message_type, here)
        elif not path and field.name in POOL_NAMES:
            yield here


def about(rpc: str, pool: types.PoolRef | None) -> Message:
    """Return a short request of an rpc about a pool, or an empty one."""
    method = RPCS[rpc]
    request = GetMessageClass(method.input_type)()
    if pool and method.name in PLAIN:
        request.CopyFrom(PLAIN[method.name])
    for *parents, last in pool_names_of(method.input_type) if pool else ():
        parent: Any = request
        for field in parents:
            parent = getattr(parent, field)
        if last in POOL_NAMES:
            setattr(parent, last, pool.name)
        else:
            getattr(parent, last).CopyFrom(pool)
    return request


def form_of(method: MethodDescriptor) -> str:
    """Return what a channel calls this kind of rpc, as "unary_stream"."""
    kinds = {True: "stream", False: "unary"}
    return f"{kinds[method.client_streaming]}_{kinds[method.server_streaming]}"


def invoke(
    channel: grpc.Channel, rpc: str, requests: list[Message] | list[bytes], **options: Any
) -> grpc.RpcError | None:
    """Call an rpc with the first request, or all that it takes; return its error."""
    method = RPCS[rpc]
    stub = getattr(channel, form_of(method))(
        rpc, _bytes_of, GetMessageClass(method.output_type).FromString
    )
    argument = iter(requests) if method.client_streaming else requests[0]
    try:
        answer = stub(argument, timeout=SECONDS, **options)
        if method.server_streaming:
            next(answer, None)
            answer.cancel()
    except grpc.RpcError as error:
        return error
    return None


def call(
    target: str,
    rpc: str,
    *,
    authorization: str | None = None,
    pool: types.PoolRef | None = None,
    tls: Tls | None = None,
) -> grpc.RpcError | None:
    """Call an rpc with a request that is empty but for its pool; return its error."""
    metadata = [("authorization", authorization)] if authorization else []
    channel = (
        grpc.secure_channel(target, tls.credentials()) if tls else grpc.insecure_channel(target)
    )
    with channel:
        return invoke(channel, rpc, [about(rpc, pool)], metadata=metadata)


def error_info(error: grpc.RpcError) -> error_details_pb2.ErrorInfo:
    """Return the ErrorInfo that every error of the service carries."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details), error
    assert info.domain == "odma"
    return info


def _bytes_of(message: Message | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()
