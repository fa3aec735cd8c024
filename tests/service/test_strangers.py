"""Strangers get nothing that costs, and one caller cannot take what all need."""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
from descriptors import error_info
from grpc_health.v1 import health_pb2, health_pb2_grpc
from servers import GEOMETRY, Server, open_pool, wait_for

from lab.bench.strangers import FIELDS, REFLECTION, call_often, private_bytes
from odma_service.client import Client
from odma_service.errors import CallerLimitError, IdentityError
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.rpc.v1.memory_service_pb2_grpc import MemoryServiceStub
from odma_service.rpc.v1.pool_service_pb2_grpc import PoolServiceStub
from odma_service.service.door.guard import LARGEST_OPEN_MESSAGE_BYTES
from odma_service.service.door.health import MOST_OF_A_PEER
from odma_service.service.door.watchers import MOST_OF_AN_IDENTITY

Code = grpc.StatusCode
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
HEALTH = "/grpc.health.v1.Health/"
PATIENCE_SECONDS = 30


def token_of(proof: str) -> str:
    return f"the-token-called-{proof}"


def bearer(proof: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token_of(proof)}")]


def admit(path, *entries: tuple[str, str, str]) -> None:
    """Make the token file say these names, roles and proofs, at once."""
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_text(
        "".join(
            f'[[identity]]\nname = "{name}"\nrole = "{role}"\ntoken = "{token_of(proof)}"\n'
            for name, role, proof in entries
        )
    )
    new.replace(path)


EVERYBODY = (
    ("engine", "engine", "new"),
    ("engine", "engine", "old"),
    ("other", "engine", "other"),
    ("greedy", "read-only", "greedy"),
    ("greedy-engine", "engine", "greedy-engine"),
)


@pytest.fixture
def guarded(servers, tmp_path):
    """Return a server with a token file, and the file."""
    tokens = tmp_path / "tokens.toml"
    admit(tokens, *EVERYBODY)
    return servers("--token-file", str(tokens), "--reflection"), tokens


@contextmanager
def connections(server: Server, count: int):
    with ExitStack() as stack:
        yield [
            stack.enter_context(grpc.insecure_channel(server.target, OWN_CONNECTION))
            for _ in range(count)
        ]


@contextmanager
def silent_calls(server: Server, connected: int, rpc: str, metadata=None):
    """Hold 32 calls on each of some connections whose message does not come."""
    stop = threading.Event()

    def never():
        stop.wait()
        yield from ()

    with connections(server, connected) as channels:
        try:
            yield [
                channel.stream_stream(rpc)(never(), metadata=metadata)
                for channel in channels
                for _ in range(32)
            ]
        finally:
            stop.set()


# --- open services ---


def test_nothing_is_kept_of_names_that_do_not_exist(guarded):
    server, _ = guarded
    unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    with grpc.insecure_channel(server.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for i in range(3):
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=f"nothing-{i}"))
            assert next(watch).status == unknown
            watch.cancel()
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="nothing"))
        assert caught.value.code() is Code.NOT_FOUND
        for name in ("", "odma.alive", "odma.v1.MemoryService"):
            request = health_pb2.HealthCheckRequest(service=name)
            assert stub.Check(request).status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("rpc", [f"{HEALTH}Check", f"{HEALTH}Watch", REFLECTION])
def test_a_strangers_message_is_small(guarded, rpc):
    server, _ = guarded
    with grpc.insecure_channel(server.target) as channel:
        large = bytes([10, 128, 8]) + bytes(LARGEST_OPEN_MESSAGE_BYTES)
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream(rpc)(iter([large]), timeout=PATIENCE_SECONDS))
        assert caught.value.code() is Code.RESOURCE_EXHAUSTED
        assert error_info(caught.value).reason == "MESSAGE_SIZE"


@pytest.mark.parametrize("rpc", FIELDS)
def test_calls_of_strangers_leave_no_memory_behind(guarded, rpc):
    server, _ = guarded
    with grpc.insecure_channel(server.target) as channel:
        call_often(channel, rpc, 300)
        before = private_bytes(server.process.pid)
        call_often(channel, rpc, 3_000)
    assert private_bytes(server.process.pid) - before < 2 << 20


@pytest.mark.parametrize("rpc", [*FIELDS, "/odma.v1.MemoryService/Apply"])
def test_a_compressed_message_is_stopped_before_it_is_large(guarded, rpc):
    server, _ = guarded
    before = peak_bytes(server)
    unlimited = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.target, unlimited) as channel:
        call = channel.stream_stream(rpc)
        zeros, packed = bytes(256 << 20), grpc.Compression.Gzip
        with pytest.raises(grpc.RpcError):
            list(call(iter([zeros]), metadata=bearer("new"), compression=packed, timeout=60))
    assert peak_bytes(server) - before < 64 << 20


def peak_bytes(server: Server) -> int:
    """Return the most memory that the server's process ever had."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    [peak] = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(peak) * 1024


def test_watchers_of_the_health_take_no_place_from_engines(guarded):
    server, _ = guarded
    with connections(server, 66) as channels:
        watches = [
            channel.unary_stream(f"{HEALTH}Watch")(b"") for channel in channels for _ in range(32)
        ]

        def told():
            return [watch for watch in watches if watch.done()]

        wait_for(lambda: len(told()) >= len(watches) - MOST_OF_A_PEER, "refusals")
        reasons = {
            (watch.code(), error_info(watch).reason)
            for watch in told()
            if watch.code() is Code.RESOURCE_EXHAUSTED
        }
        assert (Code.RESOURCE_EXHAUSTED, "CALLER_LIMIT") in reasons
        assert reasons <= {
            (Code.RESOURCE_EXHAUSTED, "CALLER_LIMIT"),
            (Code.RESOURCE_EXHAUSTED, "STREAM_LIMIT"),
        }
        with Client(server.target, token=token_of("new")) as client:
            pool = open_pool(client, "p")
            assert pool.apply().seq == 1
            assert client.is_serving()


# --- a struck-off proof ---


def test_a_token_that_was_struck_off_ends_what_it_opened(guarded):
    server, tokens = guarded
    done = threading.Event()

    def idle():
        done.wait()
        yield from ()

    with (
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = MemoryServiceStub(channel)
        opening = pb.OpenPoolRequest(
            name="p", open_id="once", geometry=GEOMETRY, capacity_tokens=4096, moves=types.MOVES_ANY
        )
        pool = stub.OpenPool(opening, metadata=bearer("new")).pool
        batch = pb.StreamRequest(apply=pb.ApplyRequest(pool=pool, seq=1))

        def one():
            yield batch
            done.wait()

        watch = PoolServiceStub(channel).Watch
        old, new = bearer("old"), bearer("new")
        bound, unbound = stub.Stream(one(), metadata=old), stub.Stream(idle(), metadata=old)
        watching = watch(pool_pb.WatchRequest(), metadata=old)
        staying = watch(pool_pb.WatchRequest(), metadata=new)
        next(bound), next(watching), next(staying)
        admit(tokens, *(one for one in EVERYBODY if one[2] != "old"))
        for call in (bound, unbound, watching):
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            assert caught.value.code() is Code.UNAUTHENTICATED
            assert error_info(caught.value).reason == "IDENTITY"
        assert stub.Apply(batch.apply, metadata=new).seq == 1  # the same batch again
        assert staying.is_active()
        done.set()
    with Client(server.target, token=token_of("old")) as client, pytest.raises(IdentityError):
        client.list_pools()


# --- greedy callers ---

SILENT = [
    ("/odma.v1.PoolService/ListPools", "greedy"),
    ("/odma.v1.PoolService/Watch", "greedy"),
    ("/odma.v1.MemoryService/Apply", "greedy-engine"),
    ("/odma.v1.MemoryService/Stream", "greedy-engine"),
]


@pytest.mark.parametrize(("rpc", "proof"), SILENT, ids=[rpc for rpc, _ in SILENT])
def test_calls_whose_message_does_not_come_hold_up_nobody(guarded, rpc, proof):
    server, _ = guarded
    with (
        silent_calls(server, 8, rpc, bearer(proof)),
        Client(server.target, token=token_of("new"), timeout_seconds=PATIENCE_SECONDS) as client,
    ):
        pool = open_pool(client, "p")
        for _ in range(3):
            pool.apply()
            with pool.stream():
                pool.apply()
            assert [one.pool.name for one in client.list_pools().pools] == ["p"]


def test_silent_calls_hold_up_nobody_where_callers_have_no_name(server):
    with (
        silent_calls(server, 8, "/odma.v1.MemoryService/Apply") as hung,
        Client(server.target, timeout_seconds=PATIENCE_SECONDS) as client,
    ):
        for _ in range(3):
            client.list_pools()
        wait_for(lambda: any(call.done() for call in hung), "the oldest to make way")
        assert {call.code() for call in hung if call.done()} <= {
            Code.CANCELLED,
            Code.RESOURCE_EXHAUSTED,
        }


def test_one_caller_has_not_all_watchers(guarded):
    server, _ = guarded
    with connections(server, 2) as channels:
        watch = PoolServiceStub(channels[0]).Watch
        own = [
            watch(pool_pb.WatchRequest(), metadata=bearer("greedy"))
            for _ in range(MOST_OF_AN_IDENTITY)
        ]
        for one in own:
            next(one)
        with pytest.raises(grpc.RpcError) as caught:
            next(watch(pool_pb.WatchRequest(), metadata=bearer("greedy")))
        assert error_info(caught.value).reason == CallerLimitError.reason
        next(PoolServiceStub(channels[1]).Watch(pool_pb.WatchRequest(), metadata=bearer("other")))
