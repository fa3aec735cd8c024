"""Stream over the wire: one request, one answer; broken, drained, replaced, too many, too fast."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from registries import open_in
from servers import books, open_pool, places_of, wait_for

from odma_service.client import Client
from odma_service.errors import (
    EpochError,
    InvalidError,
    StreamReplacedError,
    UnavailableError,
)
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.rpc.v1.memory_service_pb2_grpc import (
    MemoryServiceStub,
    add_MemoryServiceServicer_to_server,
)
from odma_service.service.rpc.memory import MemoryService
from odma_service.values import Allocate, Used


def test_batches_are_done_in_order(service, pool, name):
    with pool.stream():
        answers = [pool.apply(ops=[Allocate(f"r{i}", 10)]) for i in range(20)]
    assert [answer.seq for answer in answers] == list(range(1, 21))
    assert places_of(service, name) == {
        f"r{i}": answer.results[0] for i, answer in enumerate(answers)
    }
    assert pool.apply().seq == 21  # a call again


def test_a_stream_that_breaks_half_way_leaves_its_batch_done_and_retriable(service, wire, name):
    with Client(wire.target) as client, ThreadPoolExecutor(1) as elsewhere:
        pool = open_pool(client, name)
        with pool.stream():
            pool.apply()
            wire.hold_answers()
            lost = elsewhere.submit(pool.apply, ops=[Allocate("r", 10)])
            wait_for(lambda: service.get_pool(name).last_seq == 2, "the batch")
            wire.lose_answers()
            answer = lost.result()
            assert answer.replayed
            assert list(places_of(service, name).values()) == answer.results
            assert pool.apply(completed_seq=2).seq == 3


def test_an_answer_that_is_late_is_given_up_and_can_be_had_without_the_stream(wire, name):
    with Client(wire.target, timeout_seconds=0.2, retry_seconds=0) as client:
        pool = open_pool(client, name)
        with pool.stream():
            pool.apply()
            wire.hold_answers()
            with pytest.raises(UnavailableError):
                pool.apply(ops=[Allocate("r", 10)])
            wire.lose_answers()
        assert (pool.seq, pool.pending.seq) == (1, 2)
    with Client(wire.target) as client:
        answer = client.call(client.memory.Apply, pool.pending)
        assert answer.replayed


def test_a_bad_batch_ends_the_stream_and_the_next_opens_another(service, pool, name):
    with pool.stream():
        pool.apply()
        before = books(service, name)
        with pytest.raises(InvalidError, match=r"used\[0\]"):
            pool.apply(used=[Used(2**40, 1)])
        assert books(service, name) == before
        assert pool.apply().seq == 2


def test_a_stream_keeps_nobody_from_taking_over(service, pool, name):
    with pool.stream():
        pool.apply()
        new = open_pool(service, name, take_over=True)
        with new.stream():
            assert new.apply().seq == 1
            with pytest.raises((EpochError, StreamReplacedError)):
                pool.apply()
            assert new.apply().seq == 2


def test_a_stream_with_an_old_epoch_does_not_end_the_owners(service, pool, name):
    new = open_pool(service, name, take_over=True)
    with new.stream():
        new.apply()
        with pool.stream(), pytest.raises(EpochError):
            pool.apply()
        assert new.apply().seq == 2


# --- streams and calls ---


def test_streams_without_a_batch_make_way_for_new_ones(servers):
    server = servers("--workers", "1", "--max-pools", "1")
    stop = threading.Event()

    def idle():
        stop.wait()
        yield from ()

    own_connection = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.insecure_channel(server.target, own_connection) for _ in range(5)]
    with Client(server.target) as service:
        pool = open_pool(service, "p")
        streams = [MemoryServiceStub(channel).Stream(idle()) for channel in channels * 8]
        try:
            with pool.stream():
                for _ in range(3):
                    assert pool.apply().seq == pool.seq

            def refused():
                return [stream for stream in streams if not stream.is_active()]

            wait_for(lambda: len(refused()) >= len(streams) - 17, "room")
            for stream in refused():
                assert end_of(stream) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STREAM_LIMIT", True)
        finally:
            for stream in streams:
                stream.cancel()
            stop.set()
            for channel in channels:
                channel.close()


# --- draining ---


def end_of(call):
    """Return how a stream ended: its code, reason, and whether it says when to retry."""
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    details = rpc_status.from_call(caught.value).details
    assert any(detail.Unpack(info) for detail in details)
    return caught.value.code(), info.reason, any(detail.Unpack(retry) for detail in details)


def test_draining_ends_an_idle_stream_with_unavailable_at_once(servers):
    server = servers("--drain-seconds", "30")
    with Client(server.target) as service, grpc.insecure_channel(server.target) as channel:
        pool = open_pool(service, "p")
        stop = threading.Event()

        def requests():
            yield pb.StreamRequest(apply=pb.ApplyRequest(pool=pool.numbered(), seq=1))
            stop.wait()

        call = MemoryServiceStub(channel).Stream(requests())
        assert next(call).apply.seq == 1
        server.process.send_signal(signal.SIGTERM)
        assert end_of(call) == (grpc.StatusCode.UNAVAILABLE, "DRAINING", True)
        stop.set()
        server.process.communicate(timeout=15)  # before the drain time is over
        assert server.process.returncode == 0


def test_a_call_to_a_draining_server_is_told_when_to_retry(registry):
    registry.close()
    with serving(registry) as (_, stub), pytest.raises(grpc.RpcError) as caught:
        stub.KeepAlive(pb.KeepAliveRequest(pool=types.PoolRef(name="p", epoch=1)))
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    kinds = {detail.TypeName() for detail in rpc_status.from_call(caught.value).details}
    assert kinds == {"google.rpc.ErrorInfo", "google.rpc.RetryInfo"}


# --- a service in this process, whose pools the test can hold ---


@contextmanager
def serving(registry):
    """Serve the pools of a registry on a loopback port; yield the service and a stub of it."""

    server, memory = grpc.server(ThreadPoolExecutor(4)), MemoryService(registry, 8)
    add_MemoryServiceServicer_to_server(memory, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield memory, MemoryServiceStub(channel)
    server.stop(5).wait()
    memory.streams.close()


def test_requests_sent_too_early_wait_unread_and_are_answered_one_by_one(registry):
    epoch = open_in(registry, "p").epoch
    ref = types.PoolRef(name="p", epoch=epoch)
    sent, batches = [], 1_000
    ballast = pb.Op(allocate=pb.Alloc(request_id="r", prompt_tokens=1, text="x" * 16_384))

    def requests():
        for seq in range(1, batches + 1):
            sent.append(seq)
            yield pb.StreamRequest(apply=pb.ApplyRequest(pool=ref, seq=seq, ops=[ballast]))

    with serving(registry) as (_, stub):
        with registry.owned("p", epoch) as learner:  # so that no batch can be done
            call = stub.Stream(requests())
            looked = []
            wait_for(lambda: looked.append(len(sent)) or looked[-20:] == [len(sent)] * 20, "a halt")
            assert learner.pool.last_seq == 0
        assert looked[-1] < batches // 2  # flow control, not memory, holds the rest
        assert [answer.apply.seq for answer in call] == list(range(1, batches + 1))


def test_draining_lets_the_batch_under_way_be_answered_first(registry):
    epoch = open_in(registry, "p").epoch
    ref, stop = types.PoolRef(name="p", epoch=epoch), threading.Event()

    def requests():
        yield pb.StreamRequest(apply=pb.ApplyRequest(pool=ref, seq=1))
        stop.wait()

    with serving(registry) as (memory, stub), ThreadPoolExecutor(1) as elsewhere:
        with registry.owned("p", epoch):
            call = stub.Stream(requests())
            [stream] = wait_for_streams(memory)
            wait_for(stream.lock.locked, "the batch")
            drained = elsewhere.submit(memory.streams.end_all, UnavailableError("draining"))
        assert next(call).apply.seq == 1
        drained.result()
        assert end_of(call) == (grpc.StatusCode.UNAVAILABLE, "DRAINING", True)
        stop.set()


def test_a_batch_that_nobody_waits_for_is_not_done_once_it_has_the_pool(registry):
    epoch = open_in(registry, "p").epoch
    ref = types.PoolRef(name="p", epoch=epoch)
    with serving(registry) as (memory, stub):
        with registry.owned("p", epoch):
            call = stub.Stream(iter([pb.StreamRequest(apply=pb.ApplyRequest(pool=ref, seq=1))]))
            [stream] = wait_for_streams(memory)
            wait_for(stream.lock.locked, "the batch")
            call.cancel()
            wait_for(stream.gone.is_set, "the end of the call")
        wait_for(lambda: not memory.streams._open, "the end of the stream")
        with registry.viewed("p") as view:
            assert view.pool.last_seq == 0


def wait_for_streams(memory):
    wait_for(lambda: memory.streams._open, "a stream")
    return memory.streams._open


def test_a_client_that_takes_no_answers_does_not_keep_others_from_the_pool(registry):
    """It sends batch after batch; the pool is held for none of the time that it does not read."""
    epoch = open_in(registry, "p", capacity_tokens=2**20, max_regions=1024).epoch
    ref = types.PoolRef(name="p", epoch=epoch)
    ops = [pb.Op(trim=pb.Trim(handle=i + 1, to_tokens=1)) for i in range(1024)]

    def requests():
        for seq in range(1, 10_000):
            yield pb.StreamRequest(apply=pb.ApplyRequest(pool=ref, seq=seq, ops=ops))

    with serving(registry) as (memory, stub):
        call = stub.Stream(requests())
        looked = []

        def stuck():
            with registry.viewed("p") as view:
                looked.append(view.pool.last_seq)
            return looked[-1] and looked[-20:] == [looked[-1]] * 20

        wait_for(stuck, "a halt")
        assert looked[-1] < 9_999
        place = stub.Allocate(
            pb.AllocateRequest(pool=ref, allocate=pb.Alloc(request_id="r", prompt_tokens=1))
        ).place
        assert place.length_tokens > 0
        memory.streams.end_all(UnavailableError("draining"))  # cuts what does not end
        call.cancel()
