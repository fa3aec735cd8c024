"""A client from before fencing is served as it was, until an OpenPool with an instance is answered.

It sends no `instance`, owner number, number or promise of Reconcile. That client is in no shallow
clone, so the requests are made here, as it made them: the bytes are the same, for what is not set
is not sent, and a test holds them to the fields of that time. The scenarios of tests/conformance
that name no instance are of the same kind.
"""

from __future__ import annotations

from itertools import islice

import grpc
import pytest
from descriptors import RPCS, error_info
from google.protobuf.message import Message
from servers import CAPACITY_TOKENS, GEOMETRY, books

from odma_service.client.channel import CHANNEL_OPTIONS
from odma_service.rpc.v1 import emulator_service_pb2 as emulator_pb
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1 import predictor_service_pb2 as predictor_pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.rpc.v1.emulator_service_pb2_grpc import EmulatorServiceStub
from odma_service.rpc.v1.memory_service_pb2_grpc import MemoryServiceStub
from odma_service.rpc.v1.pool_service_pb2_grpc import PoolServiceStub
from odma_service.rpc.v1.predictor_service_pb2_grpc import PredictorServiceStub

LAST_FIELD = {
    "odma.v1.PoolRef": 2,
    "odma.v1.OpenPoolRequest": 17,
    "odma.v1.ClosePoolRequest": 1,
    "odma.v1.ReconcileRequest": 2,
    "odma.v1.Used": 3,
    "odma.v1.Alloc": 9,
    "odma.v1.Freeing": 3,
    "odma.v1.ModelConfig": 3,
}
"""Of the messages that have got more fields since: the highest number of that time."""

LATER = {"ForgetPool"}
"""Rpcs that have come since."""


class Earlier:
    """The calls of that client, and the names of those that it made."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.memory = MemoryServiceStub(channel)
        self.pools = PoolServiceStub(channel)
        self.predictor = PredictorServiceStub(channel)
        self.emulator = EmulatorServiceStub(channel)
        self.made: set[str] = set()

    def call(self, service, rpc: str, request: Message):
        insist_earlier(request)
        self.made.add(rpc)
        return getattr(service, rpc)(request, timeout=30)

    def batch(self, pool, seq, completed_seq, *ops, used=()):
        request = pb.ApplyRequest(
            pool=pool, seq=seq, completed_seq=completed_seq, used=used, ops=ops
        )
        insist_earlier(request)
        return request

    def apply(self, *batch, **more):
        return self.call(self.memory, "Apply", self.batch(*batch, **more))

    def stream(self, *batches):
        """Send batches over a stream and return their answers."""
        self.made.add("Stream")
        requests = (pb.StreamRequest(apply=batch) for batch in batches)
        return [one.apply for one in self.memory.Stream(requests, timeout=30)]


def insist_earlier(message: Message) -> None:
    """Nothing is set that messages did not have."""
    last = LAST_FIELD.get(message.DESCRIPTOR.full_name)
    for field, value in message.ListFields():
        assert last is None or field.number <= last
        if field.type == field.TYPE_MESSAGE:
            for each in value if field.is_repeated else [value]:
                insist_earlier(each)


@pytest.fixture
def earlier(server):
    with grpc.insecure_channel(server.target, CHANNEL_OPTIONS) as channel:
        yield Earlier(channel)


def opening(name, **fields):
    usual = {
        "open_id": "mine",
        "name": name,
        "device": types.Device(),
        "geometry": GEOMETRY,
        "moves": types.MOVES_ANY,
        "single_ordered_stream": True,
        "copies_may_overlap": True,
        "policy": types.PolicyChange(name="odma", limits_tokens=[64, 256, 1024]),
        "capacity_tokens": CAPACITY_TOKENS,
        "model_length_tokens": 1024,
    }
    return pb.OpenPoolRequest(**usual | fields)


def allocating(request_id):
    alloc = pb.Alloc(request_id=request_id, prompt_tokens=10, predicted_output_tokens=20)
    return pb.Op(allocate=alloc)


def freeing(handle, end=pb.END_FINISHED, output_tokens=0):
    return pb.Op(free=pb.Freeing(handle=handle, end=end, output_tokens=output_tokens))


def test_it_does_all_that_it_did(earlier, name):
    call, memory, pools = earlier.call, earlier.memory, earlier.pools
    watch = earlier.pools.Watch(pool_pb.WatchRequest(name=name), timeout=60)
    earlier.made.add("Watch")
    next(watch)

    opened = call(memory, "OpenPool", opening(name))
    assert call(memory, "OpenPool", opening(name)) == opened
    pool = opened.pool
    assert (pool.owner, pool.number) == (0, 0)

    answer = earlier.apply(pool, 1, 0, allocating("a"), allocating("b"))
    a, b = (result.place.handle for result in answer.results)
    again = earlier.apply(pool, 1, 0, allocating("a"), allocating("b"))
    assert again.replayed
    used = [pb.Used(handle=handle, used_tokens=10) for handle in (a, b)]
    extend = pb.Extend(handle=a, least_tokens=600)
    grown = earlier.apply(pool, 2, 1, pb.Op(extend=extend), used=used)
    assert grown.results[0].place.length_tokens >= 600
    trim = pb.Op(trim=pb.Trim(handle=a, to_tokens=16))
    trimmed = earlier.apply(pool, 3, 2, trim, used=used)
    assert trimmed.results[0].place.length_tokens == 16
    streamed = earlier.stream(
        earlier.batch(pool, 4, 3, freeing(b, output_tokens=5)), earlier.batch(pool, 5, 4)
    )
    assert [one.seq for one in streamed] == [4, 5]

    lone = pb.AllocateRequest(pool=pool, allocate=allocating("c").allocate)
    place = call(memory, "Allocate", lone).place
    assert call(memory, "Allocate", lone).place == place
    lone = pb.ExtendRequest(
        pool=pool, extend=pb.Extend(handle=place.handle, least_tokens=place.length_tokens + 1)
    )
    assert call(memory, "Extend", lone).place.length_tokens > place.length_tokens
    free = pb.FreeRequest(pool=pool, free=freeing(place.handle).free)
    assert [call(memory, "Free", free).already_free for _ in range(2)] == [False, True]

    kept = call(memory, "Reconcile", pb.ReconcileRequest(pool=pool, handles=[a]))
    assert [one.handle for one in kept.kept] == [a]
    assert kept.last_seq == 5
    assert call(memory, "KeepAlive", pb.KeepAliveRequest(pool=pool)).ttl_seconds == 60

    change = pb.SetPolicyRequest(pool=pool, policy=types.PolicyChange(growth=3))
    assert call(memory, "SetPolicy", change).policy.growth == 3
    for first in range(6, 40):
        done = earlier.apply(pool, first, first - 1, allocating(f"r{first}"))
        end = freeing(done.results[0].place.handle, output_tokens=first)
        call(memory, "Free", pb.FreeRequest(pool=pool, free=end.free))
    found = call(memory, "Recalibrate", pb.RecalibrateRequest(pool=pool, limits=2, dry_run=True))
    assert found.completions >= 32

    listed = call(pools, "ListPools", pool_pb.ListPoolsRequest())
    assert name in [one.pool.name for one in listed.pools]
    assert call(pools, "GetPool", pool_pb.GetPoolRequest(name=name)).last_seq == 39
    page = pool_pb.ListRegionsRequest(name=name, page_size=10_000)
    assert [one.place.handle for one in call(pools, "ListRegions", page).regions] == [a]
    prompts = [predictor_pb.Prompt(prompt_tokens=10)]
    asked = predictor_pb.PredictRequest(pool_name=name, prompts=prompts)
    assert len(call(earlier.predictor, "Predict", asked).predictions) == 1
    runs = [emulator_pb.Run(length_bytes=4096)]
    priced = emulator_pb.EstimateAccessRequest(runs=runs, access=emulator_pb.ACCESS_READ)
    assert call(earlier.emulator, "EstimateAccess", priced).seconds > 0

    for _ in range(2):
        call(memory, "ClosePool", pb.ClosePoolRequest(pool=pool))
    kinds = [pool_pb.EventKind.Name(one.event.kind) for one in islice(watch, 2)]
    assert kinds == ["EVENT_KIND_OPENED", "EVENT_KIND_POLICY_SET"]
    assert earlier.made == {rpc.rpartition("/")[2] for rpc in RPCS} - LATER


def test_it_takes_over_and_is_taken_over(earlier, name):
    first = earlier.call(earlier.memory, "OpenPool", opening(name))
    second = earlier.call(
        earlier.memory, "OpenPool", opening(name, open_id="another", take_over=True)
    )
    assert second.pool.epoch > first.pool.epoch
    with pytest.raises(grpc.RpcError) as caught:
        earlier.apply(first.pool, 1, 0)
    assert error_info(caught.value).reason == "EPOCH_OVER"
    assert earlier.apply(second.pool, 1, 0).seq == 1


def test_it_is_refused_once_an_instance_has_opened_the_pool(earlier, service, name):
    call, memory = earlier.call, earlier.memory
    request = opening(name, policy=None)
    pool = call(memory, "OpenPool", request).pool
    handle = earlier.apply(pool, 1, 0, allocating("a")).results[0].place.handle
    # The same open_id: the epoch goes on, under an owner number.
    request.instance, request.attempt = bytes(16), 1
    assert service.call(memory.OpenPool, request).pool.owner == 1
    before = books(service, name)
    extend = pb.Extend(handle=handle, least_tokens=600)
    for rpc, message in {
        "OpenPool": opening(name, policy=None),
        "Apply": earlier.batch(pool, 2, 1),
        "Allocate": pb.AllocateRequest(pool=pool, allocate=allocating("b").allocate),
        "Extend": pb.ExtendRequest(pool=pool, extend=extend),
        "Free": pb.FreeRequest(pool=pool, free=freeing(handle).free),
        "Reconcile": pb.ReconcileRequest(pool=pool),
        "KeepAlive": pb.KeepAliveRequest(pool=pool),
        "SetPolicy": pb.SetPolicyRequest(pool=pool, policy=types.PolicyChange(growth=2)),
        "Recalibrate": pb.RecalibrateRequest(pool=pool),
        "ClosePool": pb.ClosePoolRequest(pool=pool),
    }.items():
        with pytest.raises(grpc.RpcError) as caught:
            call(memory, rpc, message)
        assert error_info(caught.value).reason == "UNFENCED"
    with pytest.raises(grpc.RpcError) as caught:
        earlier.stream(earlier.batch(pool, 2, 1))
    assert error_info(caught.value).reason == "UNFENCED"
    assert books(service, name) == before
