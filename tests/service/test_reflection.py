"""A client that knows nothing but an address can call every rpc, by reflection."""

from __future__ import annotations

import grpc
import pytest
from descriptors import RPCS, error_info, form_of
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from servers import Server

SECONDS = 30

OPENING = {
    "name": "main",
    "open_id": "once",
    "geometry": {"planes": [{"count": 2, "bytes_per_token": 64}]},
    "capacity_tokens": 4096,
    "moves": "MOVES_ANY",
}
OPERATION = {"allocate": {"request_id": "r", "prompt_tokens": 10}}


class Stranger:
    """A client without any generated code of ours."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        database = ProtoReflectionDescriptorDatabase(channel)
        self._pool = DescriptorPool(database)
        self.methods = {
            f"/{service}/{method.name}": method
            for service in database.get_services()
            for method in self._pool.FindServiceByName(service).methods
        }

    def call(self, rpc: str, fields: dict) -> dict | grpc.RpcError:
        """Call an rpc, a stream with one message; return its (first) answer or its error."""
        method = self.methods[rpc]
        answer_class = GetMessageClass(method.output_type)
        stub = getattr(self._channel, form_of(method))(
            rpc, lambda message: message.SerializeToString(), answer_class.FromString
        )
        request = ParseDict(fields, GetMessageClass(method.input_type)())
        # Nothing comes from a stream of events while there are none.
        seconds = 1 if method.server_streaming and not method.client_streaming else SECONDS
        try:
            argument = iter([request]) if method.client_streaming else request
            answer = stub(argument, timeout=seconds)
            if method.server_streaming:
                first = next(answer, answer_class())
                answer.cancel()
                answer = first
        except grpc.RpcError as error:
            return error
        return MessageToDict(answer, preserving_proto_field_name=True)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("reflecting"), ("--reflection",)).start()
    with grpc.insecure_channel(server.target) as channel:
        yield Stranger(channel)
    server.kill()


@pytest.fixture(scope="module")
def pool(stranger):
    """Return a reference to a pool, for the strangers' calls."""
    return stranger.call("/odma.v1.MemoryService/OpenPool", OPENING)["pool"]


def test_reflection_tells_of_every_rpc(stranger):
    assert {rpc for rpc in stranger.methods if rpc.startswith("/odma.")} == set(RPCS)


def test_every_file_has_its_comments_of_fields_and_types(stranger):
    for rpc, method in RPCS.items():
        told = stranger.methods[rpc]
        for ours, theirs in (
            (method.input_type, told.input_type),
            (method.output_type, told.output_type),
        ):
            assert [f.name for f in ours.fields] == [f.name for f in theirs.fields]


def test_a_stranger_works_through_the_life_of_a_pool(stranger, pool):
    def memory(rpc, **fields):
        return stranger.call(f"/odma.v1.MemoryService/{rpc}", {"pool": pool, **fields})

    again = stranger.call("/odma.v1.MemoryService/OpenPool", OPENING)
    assert again["pool"] == pool
    assert "ttl_seconds" in memory("KeepAlive")
    first = memory("Apply", seq=1, ops=[OPERATION])["results"][0]["place"]
    streamed = stranger.call(
        "/odma.v1.MemoryService/Stream",
        {
            "apply": {
                "pool": pool,
                "seq": 2,
                "ops": [{"trim": {"handle": first["handle"], "to_tokens": 1}}],
            }
        },
    )
    assert streamed["apply"]["seq"] == "2"
    place = memory("Allocate", allocate={"request_id": "s", "prompt_tokens": 1})["place"]
    extended = memory("Extend", extend={"handle": place["handle"], "least_tokens": 100})
    assert extended["place"]["length_tokens"] >= 100
    assert memory("Free", free={"handle": place["handle"], "end": "END_FINISHED"}) == {}
    assert memory("Reconcile", handles=[first["handle"]])["kept"][0]["handle"] == first["handle"]
    assert memory("SetPolicy", policy={"name": "static"})["policy"]["name"] == "static"
    assert error_info(memory("Recalibrate")).reason == "NOTHING_LEARNT"
    assert stranger.call("/odma.v1.PoolService/ListPools", {})["pools"][0]["pool"] == pool
    facts = stranger.call("/odma.v1.PoolService/GetPool", {"name": "main"})
    assert facts["summary"]["regions"] == 1
    regions = stranger.call("/odma.v1.PoolService/ListRegions", {"name": "main"})["regions"]
    assert regions[0]["request_id"] == "r"
    price = stranger.call(
        "/odma.v1.EmulatorService/EstimateAccess", {"runs": [{"length_bytes": "4096"}]}
    )
    assert price["seconds"] > 0
    assert memory("ClosePool") == {}


@pytest.mark.parametrize("rpc", RPCS)
def test_a_stranger_can_call_every_rpc(stranger, rpc):
    answer = stranger.call(rpc, {})
    if not isinstance(answer, grpc.RpcError):
        return
    if answer.code() == grpc.StatusCode.DEADLINE_EXCEEDED:  # of a stream of events, without any
        assert stranger.methods[rpc].server_streaming
        return
    assert error_info(answer).reason in {"INVALID", "POOL_NOT_FOUND", "UNIMPLEMENTED"}
