"""Answers that nobody takes are bounded: for each caller, and for all."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack, closing

import grpc
import pytest
from certificates import LOCAL, Authority
from mute import Mute
from servers import open_pool, wait_for
from test_strangers import OWN_CONNECTION, admit, token_of

from lab.bench.strangers import private_bytes
from odma_service.client import Allocate, Client
from odma_service.errors import CallerLimitError
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1.pool_service_pb2_grpc import (
    PoolServiceServicer,
    PoolServiceStub,
    add_PoolServiceServicer_to_server,
)
from odma_service.service.door.guard import Guard, Pools
from odma_service.service.door.unread import MOST_BYTES, MOST_BYTES_OF_ALL, SMALL_BYTES
from odma_service.values import PolicyChange

REGIONS = 8 * 1024
LIST = "/odma.v1.PoolService/ListRegions"
PAGE = pool_pb.ListRegionsRequest(name="p", page_size=10_000)


def fill(client):
    """Make a pool of which a page is as large as pages are. Return the bytes of a page."""
    pool = open_pool(
        client,
        "p",
        capacity_tokens=16 * REGIONS,
        max_regions=REGIONS,
        policy=PolicyChange(name="static"),
    )
    for first in range(0, REGIONS, 1024):
        ids = range(first, first + 1024)
        pool.apply(ops=[Allocate(f"request-{i}", 1, max_total_tokens=16) for i in ids])
    return client.call(client._pools.ListRegions, PAGE).ByteSize()


def ask(mute, rpc=LIST, request=PAGE):
    """Ask and wait until the answer begins, or is a refusal."""
    call = mute.ask(rpc, request)
    wait_for(lambda: call in mute.begun | mute.refused, "the answer's begin")


def leave_unread(mute):
    """Ask until the bound of the caller is reached; return how many answers wait."""
    while not mute.refused:
        ask(mute)
    return len(mute.begun)


def is_refused(client):
    try:
        client.list_pools()
    except CallerLimitError:
        return True
    return False


def test_a_caller_that_takes_no_answers_gets_no_more(servers, tmp_path):
    tokens = tmp_path / "tokens.toml"
    admit(tokens, ("engine", "engine", "engine"), ("engine", "read-only", "greedy"))
    server = servers("--token-file", str(tokens))
    with (
        Client(server.target, token=token_of("engine")) as engine,
        Client(server.target, token=token_of("greedy"), retry_seconds=0) as elsewhere,
        ExitStack() as stack,
    ):
        page = fill(engine)
        before = private_bytes(server.process.pid)
        mute = stack.enter_context(closing(Mute(server.target, token=token_of("greedy"))))
        waiting = leave_unread(mute)
        assert MOST_BYTES < waiting * page <= MOST_BYTES + page
        for _ in range(100):
            ask(mute)
        assert len(mute.begun) == waiting
        assert private_bytes(server.process.pid) - before < 4 * MOST_BYTES
        with pytest.raises(CallerLimitError, match="unread"):
            elsewhere.list_pools()
        assert [one.pool.name for one in engine.list_pools().pools] == ["p"]
        assert len(engine.list_regions("p")) == REGIONS
        mute.close()
        wait_for(lambda: not is_refused(elsewhere), "an end of the refusals")


def test_without_tokens_a_caller_is_a_connection(servers):
    server = servers()
    with Client(server.target) as other, closing(Mute(server.target)) as mute:
        fill(other)
        leave_unread(mute)
        assert len(other.list_regions("p")) == REGIONS
        assert not mute.cut


# --- all callers together ---

MIB = 1024 * 1024


class Large(PoolServiceServicer):
    """A service whose answers are as large as the name that is asked for says."""

    def GetPool(self, request, context):
        return pool_pb.GetPoolResponse(model_version="x" * int(request.name))


@pytest.fixture
def large():
    """Return the address of a guarded service in this process."""
    pools = Pools.of(8)
    server = grpc.server(pools.calls, interceptors=[Guard(None, pools, 1024)])
    add_PoolServiceServicer_to_server(Large(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()
    pools.close()


def test_the_oldest_answers_of_all_are_cut(large):
    """Also if they are small: then several make way for a large one."""
    bytes_of = {}

    def greedy(count, size):
        for mute in [stack.enter_context(closing(Mute(large))) for _ in range(count)]:
            bytes_of[mute] = size
            while not mute.refused:
                ask(mute, "/odma.v1.PoolService/GetPool", pool_pb.GetPoolRequest(name=str(size)))

    def waiting():
        return sum(len(mute.begun - mute.cut) * size for mute, size in bytes_of.items())

    with ExitStack() as stack:
        greedy(1, SMALL_BYTES)
        greedy(MOST_BYTES_OF_ALL // MOST_BYTES - 2, MIB)
        first, *_, last = bytes_of
        assert not any(mute.cut for mute in bytes_of)
        greedy(8, MIB)
        wait_for(lambda: waiting() <= MOST_BYTES_OF_ALL, "the cut of the oldest")
        assert first.cut == first.begun
        greedy(16, MIB)
        full = private_bytes(os.getpid())
        greedy(32, MIB)
        wait_for(lambda: waiting() <= MOST_BYTES_OF_ALL, "the cut of those after them")
        assert last.cut == last.begun
        assert not [*bytes_of][-1].cut
        assert waiting() > MOST_BYTES_OF_ALL - 2 * MIB
        # gRPC may hold an answer twice; unbounded these would be 128 MiB, each of them twice
        assert private_bytes(os.getpid()) - full < 2 * MOST_BYTES_OF_ALL


# --- certificates ---


def test_a_caller_with_a_certificate_is_its_name_over_every_connection(servers, tmp_path):
    server, greedy, other = certified(servers, tmp_path)
    with (
        Client(server.target, tls=greedy, retry_seconds=0) as elsewhere,
        Client(server.target, tls=other) as engine,
        closing(Mute(server.target, tls=greedy)) as mute,
    ):
        fill(elsewhere)
        leave_unread(mute)
        with pytest.raises(CallerLimitError, match="unread"):
            elsewhere.list_pools()
        assert list(engine.list_pools().pools) == []


def test_a_name_has_its_share_of_calls_over_all_its_connections(servers, tmp_path):
    server, greedy, other = certified(servers, tmp_path, "--max-calls", "8")
    stop = threading.Event()

    def never():
        stop.wait()
        yield from ()

    with (
        ExitStack() as stack,
        Client(server.target, tls=greedy, retry_seconds=0) as elsewhere,
        Client(server.target, tls=other, retry_seconds=0) as engine,
    ):
        stack.callback(stop.set)
        silent = []
        for _ in range(2):
            channel = grpc.secure_channel(server.target, greedy.credentials(), OWN_CONNECTION)
            stack.enter_context(channel)
            PoolServiceStub(channel).ListPools(pool_pb.ListPoolsRequest())  # shows who it is
            silent += [channel.stream_unary(LIST).future(never()) for _ in range(2)]
        wait_for(lambda: is_refused(elsewhere), "the bound of the name")
        assert list(engine.list_pools().pools) == []
        stop.set()
        wait_for(lambda: not is_refused(elsewhere), "an end of the refusals")


def certified(servers, tmp_path, *flags):
    """Return a server that knows two names by their certificates, and what shows each."""
    authority = Authority(tmp_path)
    own = authority.sign("server", *LOCAL)
    tokens = tmp_path / "tokens.toml"
    tokens.touch(mode=0o600)
    tokens.write_text(
        "".join(
            f'[[identity]]\nname = "{name}"\nrole = "engine"\ncertificate = "{name}"\n'
            for name in ("greedy", "other")
        )
    )
    server = servers(
        *("--tls-cert", str(own.cert), "--tls-key", str(own.key), "--token-file", str(tokens)),
        *("--tls-client-ca", str(authority.cert), *flags),
    )
    return server, *(authority.trusted(authority.sign(name)) for name in ("greedy", "other"))
