"""A message that comes late, twice or out of order changes nothing that its sender gave up.

Whatever is held back here is sent later with the client's stub: the bytes are the same.
"""

from __future__ import annotations

import asyncio
import secrets
from itertools import islice

import pytest
from registries import open_in
from servers import CAPACITY_TOKENS, PLANES, books, open_pool

from odma_service.client import Allocate, AsyncClient, Client, End, Extend, Free, Moves, PlaneGroup
from odma_service.client.owner import open_request
from odma_service.errors import (
    EpochError,
    FencedError,
    LateError,
    NotCompletedError,
    OdmaError,
    RefusedError,
    StaleOpenError,
    UnavailableError,
    VersionError,
)
from odma_service.pool.openers import MOST_REMEMBERED
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.values import PolicyChange, Used
from odma_service.wire import op_to

FIELDS = {
    "planes": PLANES,
    "capacity_tokens": CAPACITY_TOKENS,
    "moves": Moves.ANY,
    "single_ordered_stream": True,
    "copies_may_overlap": True,
}


@pytest.fixture
def other(server):
    """Return the connection of another process."""
    with Client(server.target) as client:
        yield client


def live(service, name):
    """Return the handles and first tokens of a pool's regions."""
    return {r.place.handle: r.place.start_token for r in service.list_regions(name)}


def late(service, rpc, request):
    """Send a message that was held back: it is refused, and changes nothing."""
    name = request.pool.name
    before = books(service, name)
    with pytest.raises(LateError):
        service.call(getattr(service.memory, rpc), request)
    assert books(service, name) == before


def opening(name, instance, attempt, *, seen=None, **fields):
    """Return an OpenPool as an instance sends it."""
    request = open_request(name, **{**FIELDS, "open_id": "mine", **fields})
    request.instance, request.attempt = instance, attempt
    if seen is not None:
        request.seen = seen
    return request


# --- unary calls that come late ---


def test_a_late_reconcile_does_not_free_what_was_placed_since(service, pool, name):
    old = pool.allocate(Allocate("old", 100))
    held_back = pb.ReconcileRequest(pool=pool.numbered(), handles=[old.handle])
    pool.reconcile([old.handle])
    new = pool.apply(ops=[Allocate("new", 100)]).results[0]
    late(service, "Reconcile", held_back)
    assert set(live(service, name)) == {old.handle, new.handle}
    third = pool.allocate(Allocate("third", 100))
    assert third.start_token not in {old.start_token, new.start_token}
    assert pool.apply(completed_seq=1).seq == 2


def test_a_late_allocate_leaves_no_region_that_nobody_owns(service, pool, name):
    allocate = pb.Alloc(request_id="given up", prompt_tokens=10)
    held_back = pb.AllocateRequest(pool=pool.numbered(), allocate=allocate)
    pool.apply()
    late(service, "Allocate", held_back)
    assert not live(service, name)


def test_a_late_extend_and_free_change_nothing(service, pool, name):
    place = pool.allocate(Allocate("r", 10))
    extend = op_to(Extend(place.handle, 400)).extend
    free = op_to(Free(place.handle, End.ABORTED)).free
    held_back = {
        "Extend": pb.ExtendRequest(pool=pool.numbered(), extend=extend),
        "Free": pb.FreeRequest(pool=pool.numbered(), free=free),
    }
    pool.apply(used=[Used(place.handle, 10)])
    for rpc, request in held_back.items():
        late(service, rpc, request)
    assert set(live(service, name)) == {place.handle}


def test_a_late_policy_and_a_late_close_change_nothing(service, pool, name):
    change = types.PolicyChange(growth=3)
    held_back = {
        "SetPolicy": pb.SetPolicyRequest(pool=pool.numbered(), policy=change),
        "Recalibrate": pb.RecalibrateRequest(pool=pool.numbered(), limits=3),
        "ClosePool": pb.ClosePoolRequest(pool=pool.numbered()),
    }
    pool.set_policy(PolicyChange(name="odma"))
    for rpc, request in held_back.items():
        late(service, rpc, request)
    assert pool.apply().seq == 1


def test_a_call_that_was_refused_does_not_succeed_later(service, pool, name):
    wall = pool.allocate(Allocate("wall", 4096, max_total_tokens=4096))
    allocate = pb.Alloc(request_id="r", prompt_tokens=10)
    request = pb.AllocateRequest(pool=pool.numbered(), allocate=allocate)
    with pytest.raises(RefusedError):
        service.call(service.memory.Allocate, request)
    late(service, "Allocate", request)
    pool.free(Free(wall.handle, End.ABORTED))
    late(service, "Allocate", request)
    assert pool.allocate(Allocate("r", 10)).handle in live(service, name)


def test_a_policy_that_was_refused_is_not_set_later(service, pool):
    version = service.get_pool(pool.ref.name).policy.version
    request = pb.SetPolicyRequest(
        pool=pool.numbered(),
        policy=types.PolicyChange(growth=3),
        expected_version=version + 1,
    )
    with pytest.raises(VersionError):
        service.call(service.memory.SetPolicy, request)
    by_operator = types.PoolRef(name=pool.ref.name, epoch=pool.ref.epoch)
    service.call(
        service.memory.SetPolicy,
        pb.SetPolicyRequest(
            pool=by_operator, policy=types.PolicyChange(growth=2), expected_version=version
        ),
    )
    late(service, "SetPolicy", request)


def test_a_repeated_call_gets_its_answer_again(service, pool, name):
    allocate = pb.Alloc(request_id="r", prompt_tokens=10)
    request = pb.AllocateRequest(pool=pool.numbered(), allocate=allocate)
    first = service.call(service.memory.Allocate, request)
    assert service.call(service.memory.Allocate, request) == first
    extend = op_to(Extend(first.place.handle, 300)).extend
    request = pb.ExtendRequest(pool=pool.numbered(), extend=extend)
    longer = service.call(service.memory.Extend, request)
    assert service.call(service.memory.Extend, request) == longer
    free = op_to(Free(first.place.handle, End.ABORTED)).free
    request = pb.FreeRequest(pool=pool.numbered(), free=free)
    assert not service.call(service.memory.Free, request).already_free
    assert service.call(service.memory.Free, request).already_free


def test_numbers_survive_a_kill(servers):
    server = servers()
    with Client(server.target) as service:
        pool = open_pool(service, "p")
        allocate = pb.Alloc(request_id="r", prompt_tokens=10)
        held_back = pb.AllocateRequest(pool=pool.numbered(), allocate=allocate)
        kept = pool.allocate(Allocate("kept", 10))
        wall = pb.Alloc(request_id="wall", prompt_tokens=4096, max_total_tokens=4096)
        refused = pb.AllocateRequest(pool=pool.numbered(), allocate=wall)
        with pytest.raises(RefusedError):
            service.call(service.memory.Allocate, refused)
        server.restart()
        late(service, "Allocate", held_back)
        late(service, "Allocate", refused)
        assert set(live(service, "p")) == {kept.handle}
        assert pool.free(Free(kept.handle, End.ABORTED)).already_free is False


# --- OpenPool that comes late ---


def test_a_late_open_does_not_open_a_closed_pool_again(service, name):
    instance = secrets.token_bytes(16)
    held_back = opening(name, instance, 1)
    opened = service.call(service.memory.OpenPool, opening(name, instance, 2))
    opened.pool.number = 1
    service.call(service.memory.ClosePool, pb.ClosePoolRequest(pool=opened.pool))
    with pytest.raises(StaleOpenError) as caught:
        service.call(service.memory.OpenPool, held_back)
    assert (caught.value.attempt, caught.value.last) == (1, 2)
    assert service.get_pool(name).summary.state == pool_pb.POOL_STATE_CLOSED
    assert service.call(service.memory.OpenPool, opening(name, instance, 3)).pool.owner == 1


def test_an_open_that_was_refused_does_not_succeed_later(service, other, name):
    pool = open_pool(service, name)
    instance = secrets.token_bytes(16)
    with pytest.raises(OdmaError, match="is owned"):
        other.call(other.memory.OpenPool, opening(name, instance, 2))
    pool.close_pool()
    for attempt in (1, 2):
        with pytest.raises(StaleOpenError):
            other.call(other.memory.OpenPool, opening(name, instance, attempt))
    assert other.call(other.memory.OpenPool, opening(name, instance, 3)).pool.epoch


def test_a_retry_of_open_gets_a_larger_owner_number_and_fences_the_smaller(service, name):
    instance = secrets.token_bytes(16)
    first = service.call(service.memory.OpenPool, opening(name, instance, 1))
    second = service.call(service.memory.OpenPool, opening(name, instance, 5))
    assert (first.pool.owner, second.pool.owner) == (1, 2)
    first.pool.owner = second.pool.owner
    assert first == second
    first.pool.owner, first.pool.number = 1, 1
    with pytest.raises(FencedError) as caught:
        service.call(service.memory.KeepAlive, pb.KeepAliveRequest(pool=first.pool))
    assert caught.value.owner == 2


def test_who_has_opened_a_pool_is_known_after_a_kill(servers):
    server = servers()
    with Client(server.target) as service:
        gone, instance = secrets.token_bytes(16), secrets.token_bytes(16)
        service.call(service.memory.OpenPool, opening("p", gone, 1))
        opened = service.call(service.memory.OpenPool, opening("p", instance, 1))
        assert opened.pool.owner == 2
        server.restart()
        with pytest.raises(FencedError):
            service.call(service.memory.OpenPool, opening("p", gone, 2))
        with pytest.raises(StaleOpenError):
            service.call(service.memory.OpenPool, opening("p", instance, 1))
        opened.pool.number = 1
        service.call(service.memory.ClosePool, pb.ClosePoolRequest(pool=opened.pool))
        server.restart()
        with pytest.raises(FencedError):
            service.call(service.memory.OpenPool, opening("p", gone, 3))
        # New books for another geometry remember it too.
        wider = opening("p", instance, 2, planes=[PlaneGroup(4, 64)])
        assert service.call(service.memory.OpenPool, wider).pool.owner == 1
        with pytest.raises(FencedError):
            service.call(service.memory.OpenPool, opening("p", gone, 4))


def test_an_instance_that_closed_its_pool_may_open_it_after_another(service, other, name):
    open_pool(service, name).close_pool()
    open_pool(other, name).close_pool()
    assert open_pool(service, name).apply().seq == 1


def test_an_open_that_is_late_after_anothers_opens_nothing(service, other, name):
    """Be it of an instance that had closed the pool, or of one that the pool never met."""
    known, stranger = secrets.token_bytes(16), secrets.token_bytes(16)
    opened = service.call(service.memory.OpenPool, opening(name, known, 1, take_over=True))
    opened.pool.number = 1
    service.call(service.memory.ClosePool, pb.ClosePoolRequest(pool=opened.pool))
    with pytest.raises(StaleOpenError) as caught:
        service.call(service.memory.OpenPool, opening(name, stranger, 1, seen=""))
    held_back = [
        opening(name, instance, 2, seen=caught.value.seen, take_over=True)
        for instance in (known, stranger)
    ]
    owner = open_pool(other, name)
    for close in (False, True):
        if close:
            owner.close_pool()
        before = books(other, name)
        for message in held_back:
            with pytest.raises(StaleOpenError):
                service.call(service.memory.OpenPool, message)
        assert books(other, name) == before


def test_who_is_forgotten_opens_nothing_late(servers):
    server = servers()
    with Client(server.target) as service:
        instance = secrets.token_bytes(16)
        opened = service.call(service.memory.OpenPool, opening("p", instance, 1))
        opened.pool.number = 1
        service.call(service.memory.ClosePool, pb.ClosePoolRequest(pool=opened.pool))
        with pytest.raises(StaleOpenError) as caught:
            service.call(service.memory.OpenPool, opening("p", instance, 1, seen=""))
        for _ in range(MOST_REMEMBERED + 1):
            other = opening("p", secrets.token_bytes(16), 1)
            opened = service.call(service.memory.OpenPool, other)
            opened.pool.number = 1
            service.call(service.memory.ClosePool, pb.ClosePoolRequest(pool=opened.pool))
        for attempt in (1, 2):
            held_back = opening("p", instance, attempt, seen=caught.value.seen)
            with pytest.raises(StaleOpenError):
                service.call(service.memory.OpenPool, held_back)
        # What is not promised: one that does not say what it saw is a stranger now.
        assert service.call(service.memory.OpenPool, opening("p", instance, 1)).pool.owner == 1


@pytest.mark.parametrize(
    ("instance", "attempt", "field"),
    [(b"short", 1, "instance"), (b"", 1, "attempt"), (bytes(16), 0, "attempt")],
)
def test_an_instance_that_makes_no_sense_is_invalid(service, name, instance, attempt, field):
    with pytest.raises(OdmaError, match=field):
        service.call(service.memory.OpenPool, opening(name, instance, attempt))


# --- two processes with one open_id ---


def test_two_processes_with_one_open_id_are_told_apart(service, other, name):
    slow = open_pool(service, name, open_id="mine")
    place = slow.allocate(Allocate("r", 10))
    successor = open_pool(other, name, open_id="mine")
    assert successor.ref.epoch == slow.ref.epoch
    new = successor.allocate(Allocate("new", 10))
    before = books(other, name)
    calls = [
        lambda: slow.free(Free(new.handle, End.ABORTED)),
        lambda: slow.reconcile([]),
        slow.apply,
        slow.keep_alive,
        slow.close_pool,
    ]
    for call in calls:
        with pytest.raises(FencedError):
            call()
    for rpc, request in (
        ("Reconcile", pb.ReconcileRequest()),
        ("KeepAlive", pb.KeepAliveRequest()),
        ("ClosePool", pb.ClosePoolRequest()),
        ("Apply", pb.ApplyRequest(seq=1)),
    ):
        request.pool.CopyFrom(slow.numbered())
        with pytest.raises(FencedError):
            service.call(getattr(service.memory, rpc), request)
    with pytest.raises(FencedError):  # it does not come back by itself
        open_pool(service, name, open_id="mine")
    assert books(other, name) == before
    assert set(live(other, name)) == {place.handle, new.handle}


def test_a_succession_is_an_event(service, other, name):
    answers = service.watch(name)
    next(answers)
    open_pool(service, name, open_id="mine")
    open_pool(service, name, open_id="mine")  # the same instance
    open_pool(other, name, open_id="mine").close_pool()
    kinds = [pool_pb.EventKind.Name(answer.event.kind) for answer in islice(answers, 3)]
    answers.close()
    assert kinds == ["EVENT_KIND_OPENED", "EVENT_KIND_SUCCEEDED", "EVENT_KIND_CLOSED"]


def test_the_last_batch_is_retried_by_the_successor(service, other, name):
    first = open_pool(service, name, open_id="mine")
    request = pb.ApplyRequest(seq=1, ops=[op_to(Allocate("r", 10))])
    request.pool.CopyFrom(first.numbered())
    answer = service.call(service.memory.Apply, request)
    successor = open_pool(other, name, open_id="mine")
    request.pool.CopyFrom(successor.numbered())
    again = other.call(other.memory.Apply, request)
    assert again.replayed
    again.replayed = False
    assert again == answer


def test_a_late_batch_of_an_earlier_owner_number_is_not_done(service, other, name):
    first = open_pool(service, name, open_id="mine")
    held_back = pb.ApplyRequest(pool=first.numbered(), seq=1, ops=[op_to(Allocate("r", 10))])
    open_pool(other, name, open_id="mine")
    with pytest.raises(FencedError):
        service.call(service.memory.Apply, held_back)
    assert not live(service, name)


def test_a_late_batch_is_not_done_after_what_came_instead(service, pool, name):
    held_back = pb.ApplyRequest(pool=pool.numbered(), seq=1, ops=[op_to(Allocate("r", 10))])
    pool.reconcile([])
    late(service, "Apply", held_back)
    assert pool.apply().seq == 1


# --- operators, who have no owner number ---


def test_an_operator_is_fenced_by_epoch_and_version(service, pool, name):
    ref = types.PoolRef(name=name, epoch=pool.ref.epoch)
    version = service.get_pool(name).policy.version
    change = types.PolicyChange(growth=2)
    request = pb.SetPolicyRequest(pool=ref, policy=change, expected_version=version)
    service.call(service.memory.SetPolicy, request)
    with pytest.raises(VersionError):
        service.call(service.memory.SetPolicy, request)
    service.call(service.memory.ClosePool, pb.ClosePoolRequest(pool=ref, by_operator=True))
    again = open_pool(service, name)
    with pytest.raises(EpochError):
        service.call(service.memory.ClosePool, pb.ClosePoolRequest(pool=ref, by_operator=True))
    assert again.apply().seq == 1


# --- promises ---


def test_reconcile_does_not_keep_places_whose_copies_were_never_made(service, pool, name):
    place = pool.apply(ops=[Allocate("r", 10)]).results[0]
    pool.apply(used=[Used(place.handle, 10)], completed_seq=1)
    request = pb.ReconcileRequest(pool=pool.numbered(), handles=[place.handle])
    for completed_seq in (0, 1):
        request.pool.CopyFrom(pool.numbered())
        request.completed_seq = completed_seq
        with pytest.raises(NotCompletedError) as caught:
            service.call(service.memory.Reconcile, request)
        assert caught.value.last_seq == 2
    with pytest.raises(OdmaError, match="completed_seq"):
        pool.reconcile([place.handle], completed_seq=3)
    assert pool.reconcile([place.handle]).last_seq == 2


def test_a_client_reconciles_and_calls_nothing_while_a_batch_has_no_answer(pool, name):
    place = pool.allocate(Allocate("r", 10))
    pool.prepare([], [], None, None, pass_refused=False)
    calls = [
        lambda: pool.reconcile([place.handle]),
        lambda: pool.allocate(Allocate("s", 10)),
        lambda: pool.extend(Extend(place.handle, 100)),
        lambda: pool.free(Free(place.handle, End.ABORTED)),
        lambda: pool.set_policy(PolicyChange(growth=2)),
        pool.recalibrate,
    ]
    for call in calls:
        with pytest.raises(OdmaError, match="no answer"):
            call()
    assert pool.resume().seq == 1
    pool.prepare([], [], None, None, pass_refused=False)
    assert pool.reconcile([]).freed == [place.handle]
    assert pool.apply().seq == 2


# --- clients ---


def test_a_refusal_whose_answer_was_lost_is_asked_for_again(service, pool):
    wall = pool.allocate(Allocate("wall", 4096, max_total_tokens=4096))
    allocate = pb.Alloc(request_id="r", prompt_tokens=10)
    pool.numbered()
    with pytest.raises(RefusedError):
        service.call(service.memory.Allocate, pb.AllocateRequest(pool=pool.ref, allocate=allocate))
    pool.ref.number -= 1  # as if that answer had been lost
    with pytest.raises(RefusedError):
        pool.allocate(Allocate("r", 10))
    pool.ref.number -= 1
    assert pool.free(Free(wall.handle, End.ABORTED)).already_free is False


def test_the_tasks_of_a_loop_take_turns(server, name):
    async def live_together():
        async with AsyncClient(server.target) as client:
            pool = await client.open_pool(name, **FIELDS)
            places = await asyncio.gather(
                *(pool.allocate(Allocate(f"r{i}", 10)) for i in range(10)),
                *(pool.apply(ops=[Allocate(f"b{i}", 10)]) for i in range(10)),
            )
            assert pool.seq == 10
            return len(places)

    assert asyncio.run(live_together()) == 20


def test_a_call_that_nobody_waits_for_is_not_done_once_it_has_the_pool(registry):
    epoch = open_in(registry, "p").epoch
    with pytest.raises(UnavailableError), registry.owned("p", epoch, lambda: False):
        pass
    with registry.owned("p", epoch, lambda: True) as learner:
        assert learner.pool.report().epoch == epoch
