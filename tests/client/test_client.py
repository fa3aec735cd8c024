"""The client against a real server, and against a network that loses answers."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from servers import books, open_pool, places_of, wait_for

from odma_service import errors
from odma_service.client import Client, PoolClient
from odma_service.errors import OdmaError, UnavailableError
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1.pool_service_pb2_grpc import (
    PoolServiceServicer,
    add_PoolServiceServicer_to_server,
)
from odma_service.service.rpc.statuses import reports_errors
from odma_service.values import (
    Allocate,
    End,
    Extend,
    Free,
    PolicyChange,
    Reason,
    Refusal,
    Used,
)

# --- answers ---


def test_an_answer_that_was_lost_is_asked_for_again(service, wire, name):
    with Client(wire.target) as client, ThreadPoolExecutor(1) as elsewhere:
        pool = open_pool(client, name)
        wire.hold_answers()
        lost = elsewhere.submit(pool.apply, ops=[Allocate("r", 10)])
        wait_for(lambda: service.get_pool(name).last_seq == 1, "the batch")
        wire.lose_answers()
        answer = lost.result()
        assert answer.replayed
        assert list(places_of(service, name).values()) == answer.results
        assert pool.apply(completed_seq=1).seq == 2


def test_a_batch_without_an_answer_in_time_can_be_resumed(service, wire, name):
    with Client(wire.target, timeout_seconds=0.1, retry_seconds=0.3) as client:
        pool = open_pool(client, name)
        wire.hold_answers()
        with pytest.raises(UnavailableError, match="DEADLINE_EXCEEDED"):
            pool.apply(ops=[Allocate("r", 10)])
        assert (pool.seq, pool.pending.seq) == (0, 1)
        with pytest.raises(OdmaError, match="resume"):
            pool.apply()
        wire.lose_answers()
        assert pool.resume().replayed
        assert (pool.seq, pool.pending) == (1, None)
        assert pool.apply().seq == 2


def test_nothing_is_resumed_twice(pool):
    pool.apply()
    with pytest.raises(OdmaError, match="nothing to resume"):
        pool.resume()


def test_a_lost_unary_call_is_done_once(service, wire, name):
    with Client(wire.target) as client, ThreadPoolExecutor(1) as elsewhere:
        pool = open_pool(client, name)
        wire.hold_answers()
        lost = elsewhere.submit(pool.allocate, Allocate("r", 10))
        wait_for(lambda: service.get_pool(name).summary.regions == 1, "the region")
        wire.lose_answers()
        assert list(places_of(service, name).values()) == [lost.result()]


def test_a_lost_opening_gets_the_same_epoch(service, wire, name):
    with Client(wire.target) as client, ThreadPoolExecutor(1) as elsewhere:
        client.list_pools()
        wire.hold_answers()
        lost = elsewhere.submit(open_pool, client, name)
        wait_for(lambda: name in [p.pool.name for p in service.list_pools().pools], "the pool")
        epoch = service.get_pool(name).summary.pool.epoch
        wire.lose_answers()
        assert lost.result().ref.epoch == epoch


def test_a_policy_is_never_set_twice(service, wire, name):
    with Client(wire.target) as client, ThreadPoolExecutor(1) as elsewhere:
        pool = open_pool(client, name)
        version = pool.response.policy_version
        wire.hold_answers()
        lost = elsewhere.submit(pool.set_policy, PolicyChange(name="static"))
        wait_for(lambda: service.get_pool(name).policy.version == version + 1, "the policy")
        wire.lose_answers()
        assert isinstance(lost.exception(), UnavailableError)
        assert service.get_pool(name).policy.version == version + 1


def test_nobody_there_is_an_error_in_time():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Client(f"127.0.0.1:{port}", retry_seconds=0.1) as client:
        with pytest.raises(UnavailableError):
            client.list_pools()
        with pytest.raises(UnavailableError):
            client.is_serving()


def test_an_owner_that_lost_its_state_goes_on(service, name):
    before = open_pool(service, name, open_id="mine")
    kept = before.allocate(Allocate("kept", 10))
    before.apply()
    before.apply()
    after = open_pool(service, name, open_id="mine")
    with pytest.raises(errors.NotCompletedError) as caught:
        after.reconcile([kept.handle])
    assert caught.value.last_seq == 2
    assert after.reconcile([kept.handle], completed_seq=2).kept == [kept]
    assert after.apply(ops=[Extend(kept.handle, 50)]).seq == 3


def test_a_bad_batch_can_be_followed_by_a_good_one(service, pool, name):
    before = books(service, name)
    with pytest.raises(errors.InvalidError, match=r"used\[0\]"):
        pool.apply(used=[Used(2**40, 1)])
    assert books(service, name) == before
    assert pool.apply().seq == 1


def test_the_completed_seq_stays_until_it_is_said_anew(service, pool, name):
    pool.apply()
    pool.apply(completed_seq=1)
    pool.apply()
    assert service.get_pool(name).completed_seq == 1


def test_a_connection_may_be_shared(service, name):
    def run(i):
        pool = open_pool(service, f"{name}-{i}")
        for _ in range(20):
            answer = pool.apply(ops=[Allocate("r", 10)])
            pool.apply(ops=[Free(answer.results[0].handle, End.FINISHED, 1)])
        return service.get_pool(f"{name}-{i}").counters.finished

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(run, range(4))) == [20] * 4


def test_regions_are_read_to_the_end(service, name, monkeypatch):
    monkeypatch.setattr("odma_service.client.sync.PAGE_REGIONS", 2)
    pool = open_pool(service, name)
    pool.apply(ops=[Allocate(f"r{i}", 10) for i in range(7)])
    assert [region.request_id for region in service.list_regions(name)] == [
        f"r{i}" for i in range(7)
    ]


# --- errors ---


@contextmanager
def failing_service(error):
    """Serve a PoolService that answers every GetPool with `error`."""

    class Failing(PoolServiceServicer):
        @reports_errors
        def GetPool(self, request, context):
            raise error

    server = grpc.server(ThreadPoolExecutor(1))
    add_PoolServiceServicer_to_server(Failing(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}", retry_seconds=0) as client:
            yield client
    finally:
        server.stop(0).wait()


REFUSAL = Refusal(Reason.FRAGMENTED, 1, 2, 3, 4, 5, "")


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidError("ops[3].free.end", "must be one of 1, 2"),
        errors.PoolNotFoundError("p"),
        errors.PoolOwnedError("p", 12.5),
        errors.EpochError("p", 2**52),
        errors.SeqChangedError(7),
        errors.SeqOldError(3, 7),
        errors.SeqGapError(9, 7),
        errors.VersionError(3, 4),
        errors.NothingLearntError("too few"),
        errors.RefusedError(REFUSAL),
        errors.HandleError(2**52, "its region must be live"),
        errors.PoolLimitError("all pools are open"),
        errors.BooksError("broken"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_arrives_as_it_was_raised(error):
    with failing_service(error) as client, pytest.raises(OdmaError) as caught:
        client.get_pool("p")
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.BooksLockedError("another process has it"), UnavailableError),
        (ZeroDivisionError("secret"), UnavailableError),
    ],
    ids=["locked", "bug"],
)
def test_after_these_errors_the_call_may_have_been_done(error, kind):
    with failing_service(error) as client, pytest.raises(kind) as caught:
        client.get_pool("p")
    assert "secret" not in str(caught.value)


def test_a_message_that_is_too_large_is_the_callers_mistake(pool):
    operations = [Allocate(f"r{i}", 10, text="x" * 16_384) for i in range(300)]
    with pytest.raises(errors.MessageSizeError):
        pool.apply(ops=operations)
    assert pool.apply().seq == 1


def test_a_client_of_an_unknown_epoch_is_told_to_open_again(service, pool):
    stranger = PoolClient(service, pb.OpenPoolResponse(pool=pool.ref))
    stranger.ref.epoch += 1
    with pytest.raises(errors.EpochError, match="open the pool again"):
        stranger.apply()
