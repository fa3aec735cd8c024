"""What one caller sends stops nobody else: the server goes on, and every answer fits a header."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from itertools import chain

import grpc
import pytest
from descriptors import error_info, invoke
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status
from servers import Server, wait_for

from odma_service.client import Client
from odma_service.rpc.v1 import emulator_service_pb2 as emulator_pb
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.rpc.v1.pool_service_pb2_grpc import PoolServiceStub
from odma_service.service.door.calls import Calls, Pace
from odma_service.service.door.guard import STRANGERS

Code = grpc.StatusCode
HEALTH = health_pb2.HealthCheckRequest()


def test_health_watchers_that_come_and_go_freeze_nothing(servers):
    server = servers()
    for _ in range(20):
        with grpc.insecure_channel(server.target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for i in range(20):
                watch = stub.Watch(HEALTH)
                if i % 2:
                    next(watch)
                watch.cancel()
    with Client(server.target) as client:
        assert client.is_serving()
        assert list(client.list_pools().pools) == []
    assert server.terminate() == 0


def test_many_health_watchers_leave_room_for_checks(server):
    with grpc.insecure_channel(server.target) as channel, Client(server.target) as client:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(HEALTH) for _ in range(10)]
        for watch in watches:
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        assert client.is_serving()
        for watch in watches:
            watch.cancel()


def silent(channel, rpc, stop, count):
    """Begin calls whose message does not come until `stop` is set."""

    def never():
        stop.wait()
        yield from ()

    begin = channel.stream_unary(rpc).future
    return [begin(never()) for _ in range(count)]


@pytest.mark.parametrize("rpc", ["Check", "Watch"])
def test_silent_callers_of_the_health_keep_no_other_from_an_answer(server, rpc):
    stop, own_connection = threading.Event(), [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.insecure_channel(server.target, own_connection) for _ in range(4)]
    try:
        hung = [silent(channel, f"/grpc.health.v1.Health/{rpc}", stop, 30) for channel in channels]
        with Client(server.target, timeout_seconds=30) as client:
            for _ in range(3):
                assert client.is_serving()
        if rpc == "Check":  # those who have waited longest are cut

            def ended():
                return [call.code() for call in chain(*hung) if call.done()]

            wait_for(lambda: len(ended()) >= 4 * 30 - STRANGERS, "room")
            assert set(ended()) == {Code.CANCELLED}
            check = health_pb2_grpc.HealthStub(channels[0]).Check
            assert check(HEALTH, timeout=30).status == 1
    finally:
        stop.set()
        for channel in channels:
            channel.close()


def test_silent_callers_of_reflection_keep_nobody_from_the_health(servers):
    server, stop = servers("--reflection"), threading.Event()
    rpc = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    with grpc.insecure_channel(server.target) as channel:
        hung = silent(channel, rpc, stop, 20)
        with Client(server.target, timeout_seconds=30) as client:
            assert client.is_serving()
        stop.set()
        assert {call.code() for call in hung} <= {Code.OK, Code.CANCELLED}


def test_a_health_call_without_a_message_ends(server):
    stop = threading.Event()
    stop.set()
    with grpc.insecure_channel(server.target) as channel:
        [call] = silent(channel, "/grpc.health.v1.Health/Check", stop, 1)
        assert call.code() == Code.UNIMPLEMENTED


# --- what gRPC itself refuses, as docs/reference/errors.md has it ---


def refused_by_grpc(call):
    """Return how a call ends that gRPC answers: nothing is known but the code and a text."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert rpc_status.from_call(caught.value) is None
    return caught.value.code(), caught.value.details()


def test_headers_that_are_too_long_are_refused_by_grpc(server):
    with grpc.insecure_channel(server.target) as channel:
        list_pools = PoolServiceStub(channel).ListPools
        long = (("x-long", "x" * 17 * 1024),)
        code, text = refused_by_grpc(
            lambda: list_pools(pool_pb.ListPoolsRequest(), metadata=long, timeout=30)
        )
        assert code == Code.RESOURCE_EXHAUSTED
        assert "metadata" in text
        list_pools(pool_pb.ListPoolsRequest(), timeout=30)


def test_a_call_that_ends_without_its_message_is_refused_by_grpc(server):
    with grpc.insecure_channel(server.target) as channel:
        call = channel.stream_unary("/odma.v1.PoolService/ListPools")
        code, _ = refused_by_grpc(lambda: call(iter(()), timeout=30))
        assert code == Code.UNIMPLEMENTED


def test_calls_beyond_a_connections_share_wait_in_the_client(servers):
    server, stop = servers("--workers", "2"), threading.Event()
    with grpc.insecure_channel(server.target) as channel, Client(server.target) as other:
        grpc.channel_ready_future(channel).result(timeout=30)  # it knows its share
        hung = silent(channel, "/odma.v1.MemoryService/Stream", stop, 16)
        list_pools = PoolServiceStub(channel).ListPools

        def waits():  # once the others have been sent
            with suppress(grpc.RpcError):
                list_pools(pool_pb.ListPoolsRequest(), timeout=0.3)
                return False
            return True

        wait_for(waits, "a call without a place")
        code, _ = refused_by_grpc(lambda: list_pools(pool_pb.ListPoolsRequest(), timeout=0.3))
        assert code == Code.DEADLINE_EXCEEDED
        waiting = list_pools.future(pool_pb.ListPoolsRequest(), timeout=30)
        other.list_pools()
        assert not waiting.done()
        hung[0].cancel()
        assert list(waiting.result().pools) == []
        stop.set()


def test_a_caller_that_reads_while_others_work_has_few_calls_at_once_and_alone_has_all():
    others, done = threading.Event(), []
    others.set()
    pace = Pace(share=1e-9, burst_seconds=0.1, call_seconds=0.04, busy=lambda _: others.is_set())
    with Calls(16, pace=pace) as calls:
        for _ in range(20):
            calls.submit(done.append, 1)
        wait_for(lambda: calls.count == 20 - 3, "the first")
        calls.sweep()
        assert len(done) == 3
        others.clear()
        calls.sweep()
        wait_for(lambda: calls.count == 0, "the rest")
    assert len(done) == 20


def test_an_error_is_short_whatever_was_sent(server):
    preset = "\N{PILE OF POO}" * 100_000
    request = emulator_pb.EstimateAccessRequest(device=types.Device(preset=preset))
    with grpc.insecure_channel(server.target) as channel:
        error = invoke(channel, "/odma.v1.EmulatorService/EstimateAccess", [request])
    assert error.code() == Code.INVALID_ARGUMENT
    assert error_info(error).metadata["field"] == "device.preset"
    assert len(error.details()) <= 200


@pytest.fixture(scope="module")
def tidy(tmp_path_factory):
    """Return a server that never looks for garbage: what is in a cycle stays."""
    directory = tmp_path_factory.mktemp("tidy")
    (directory / "sitecustomize.py").write_text("import gc\n\ngc.disable()\n")
    tokens = directory / "tokens.toml"
    tokens.touch(mode=0o600)
    tokens.write_text('[[identity]]\nname = "e"\nrole = "engine"\ntoken = "token-of-the-engine"\n')
    flags = ("--reflection", "--token-file", str(tokens), "--workers", "16")
    paths = os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"PYTHONPATH": paths}
    running = Server(directory, flags, environment=environment).start()
    yield running
    running.kill()


def cancelled(call) -> None:
    """End a stream after its first answer."""
    next(call)
    call.cancel()


REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
LIST = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
NO_MESSAGE = b"\xff\xff\xff"
APPLY, STREAM = ("/odma.v1.MemoryService/Apply", "/odma.v1.MemoryService/Stream")
LIST_POOLS, WATCH = ("/odma.v1.PoolService/ListPools", "/odma.v1.PoolService/Watch")
TOKEN = [("authorization", "Bearer token-of-the-engine")]


@pytest.mark.parametrize(
    "call",
    [
        lambda channel: channel.unary_unary(APPLY)(b"", metadata=TOKEN),
        lambda channel: channel.unary_unary(APPLY)(NO_MESSAGE, metadata=TOKEN),
        lambda channel: channel.unary_unary(APPLY)(b""),
        lambda channel: channel.unary_unary("/odma.v1.MemoryService/Nothing")(b"", metadata=TOKEN),
        lambda channel: list(channel.stream_stream(STREAM)(iter([b""]), metadata=TOKEN)),
        lambda channel: list(channel.stream_stream(STREAM)(iter([NO_MESSAGE]), metadata=TOKEN)),
        lambda channel: list(channel.stream_stream(REFLECTION)(iter([NO_MESSAGE]))),
        lambda channel: cancelled(channel.stream_stream(REFLECTION)(chain([LIST], never_more()))),
        lambda channel: channel.unary_unary(LIST_POOLS)(b"", metadata=TOKEN),
        lambda channel: cancelled(channel.unary_stream(WATCH)(b"", metadata=TOKEN)),
    ],
    ids=[
        "error",
        "garbage",
        "token",
        "rpc",
        "stream",
        "stream-garbage",
        "reflection",
        "gone",
        "answered",
        "watch",
    ],
)
def test_a_call_that_has_ended_gives_its_place_in_the_connection_back(tidy, call):
    with grpc.insecure_channel(tidy.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        for _ in range(80):  # a connection has 16 places; watchers hold some for a second
            with suppress(grpc.RpcError):
                call(channel)
        wait_for(lambda: code_of(channel.unary_unary(APPLY)) is Code.INVALID_ARGUMENT, "room", 10)


def code_of(method) -> Code:
    with pytest.raises(grpc.RpcError) as error:
        method(b"", metadata=TOKEN, timeout=10)
    return error.value.code()


def never_more():
    """Yield nothing, and not yet the end."""
    threading.Event().wait(0.2)
    yield from ()
