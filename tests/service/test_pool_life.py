"""Owners that fall silent, hang, stop or come back; and calls that wait for nobody else's."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from registries import Clock, open_in, registry_of, state
from servers import open_pool, wait_for

from odma_service.client import Client
from odma_service.errors import (
    EpochError,
    OdmaError,
    PoolNotFoundError,
    PoolOpenError,
    UnavailableError,
)
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.service.rpc.reports import summary_to
from odma_service.service.watch.events import EventKind
from odma_service.values import Allocate, Batch, End, Free, PolicyChange, TenantShare, Used

OPEN, STALE, CLOSED = (
    pool_pb.POOL_STATE_OPEN,
    pool_pb.POOL_STATE_STALE,
    pool_pb.POOL_STATE_CLOSED,
)


def told_state(registry, name):
    with registry.viewed(name) as view:
        return summary_to(view).state


def logged(server):
    """Return the events of a server that logs as JSON."""
    return [json.loads(line)["event"] for line in server.log.read_text().splitlines()]


# --- clocks ---


def test_a_silent_pool_is_stale_after_its_ttl_and_the_next_call_revives_it(registry, clock):
    epoch = open_in(registry, "p", ttl_seconds=5).epoch
    clock.now += 5
    registry.reap()
    assert told_state(registry, "p") == OPEN
    clock.now += 0.1
    registry.reap()
    assert told_state(registry, "p") == STALE
    with registry.owned("p", epoch) as learner:
        learner.apply(epoch, Batch(1, 0, [], [Allocate("r", 10)]))
    assert told_state(registry, "p") == OPEN
    assert state(registry, "p") == (epoch, 0)


def test_opening_again_with_the_same_open_id_is_a_call_too(registry, clock):
    epoch = open_in(registry, "p", ttl_seconds=5, retention_seconds=10).epoch
    clock.now += 9
    assert open_in(registry, "p", ttl_seconds=5, retention_seconds=10).epoch == epoch
    clock.now += 9
    assert state(registry, "p") == (epoch, 9)


def test_looking_at_a_pool_does_not_keep_it(registry, clock):
    open_in(registry, "p", ttl_seconds=1, retention_seconds=10)
    for _ in range(3):
        clock.now += 3
        assert told_state(registry, "p") == STALE
    clock.now += 3
    registry.reap()
    assert told_state(registry, "p") == CLOSED


def test_a_pool_is_closed_after_its_retention_though_nobody_looks(registry, clock, tmp_path):
    open_in(registry, "p", ttl_seconds=1, retention_seconds=10)
    clock.now += 10.1
    registry.reap()
    registry.close()
    after = registry_of(tmp_path, clock)  # whose clocks start anew
    assert told_state(after, "p") == CLOSED
    after.close()


def test_the_clocks_start_anew_with_the_service(registry, clock, tmp_path):
    epoch = open_in(registry, "p", ttl_seconds=5, retention_seconds=10).epoch
    clock.now += 9
    registry.close()
    clock.now += 1000
    after = registry_of(tmp_path, clock)
    after.attach_all()
    assert state(after, "p") == (epoch, 0)
    clock.now += 9
    assert state(after, "p") == (epoch, 9)
    after.close()


def test_a_pool_in_use_is_not_closed_under_its_owner(registry, clock):
    epoch = open_in(registry, "p", ttl_seconds=1, retention_seconds=1).epoch
    with registry.owned("p", epoch) as learner:
        clock.now += 100  # a long batch
        registry.reap()
        assert learner.apply(epoch, Batch(1, 0, [], [])).seq == 1


def test_a_server_closes_the_pool_of_a_silent_owner_by_itself(servers):
    server = servers("--log-format", "json")
    with Client(server.target) as service:
        silent = open_pool(service, "silent", ttl_seconds=1, retention_seconds=1)
        patient = open_pool(service, "patient", ttl_seconds=1)
        wait_for(lambda: "pool closed: its owner is silent" in logged(server), "the end")
        wait_for(lambda: "pool stale: its owner is silent" in logged(server), "the stale pool")
        assert service.get_pool("patient").summary.state == STALE
        assert patient.keep_alive().ttl_seconds == 1
        assert service.get_pool("patient").summary.state == OPEN
        with pytest.raises(EpochError):
            silent.keep_alive()
        assert "pool revived: its owner is back" in logged(server)


# --- those who hang ---

ENGINE = """
import sys; sys.path.insert(0, sys.argv[2])
from servers import open_pool
from odma_service.client import Allocate, Client
with Client(sys.argv[1]) as service:
    pool = open_pool(service, "stopped")
    with pool.stream():
        pool.apply(ops=[Allocate("r", 100)])
        print("at work", flush=True)
        try:
            while True:
                pool.apply()
        except Exception as error:
            print(type(error).__name__, flush=True)
"""


def test_a_stopped_engine_disturbs_nobody_and_finds_out_that_it_was_replaced(servers, request):
    server = servers("--workers", "1")
    command = [
        sys.executable,
        "-c",
        ENGINE,
        server.target,
        str(request.config.rootpath / "tests" / "support"),
    ]
    engine = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert engine.stdout.readline() == "at work\n"
        engine.send_signal(signal.SIGSTOP)
        with Client(server.target) as service:
            other = open_pool(service, "other")
            assert [other.apply().seq for _ in range(3)] == [1, 2, 3]
            assert open_pool(service, "stopped", take_over=True).apply().seq == 1
        engine.send_signal(signal.SIGCONT)
        assert engine.communicate(timeout=60)[0] == "EpochError\n"
    finally:
        engine.kill()
        engine.communicate()


def test_calls_whose_message_never_comes_leave_room_for_others(server, service, name):
    """A connection may have half of the threads, and no more."""
    hang = threading.Event()

    def never():
        hang.wait()
        yield from ()

    with grpc.insecure_channel(server.target) as channel:
        apply = channel.stream_unary("/odma.v1.MemoryService/Apply")
        hung = [apply.future(never()) for _ in range(200)]
        try:
            pool = open_pool(service, name)
            assert [pool.apply().seq for _ in range(3)] == [1, 2, 3]
            assert not any(call.done() for call in hung)
        finally:
            for call in hung:
                call.cancel()
            hang.set()


# --- calls of other pools while a batch is being planned ---


BLOCK, BLOCKS = 16, 8_000


def fragmented(registry, name):
    """Open a pool and return its epoch, last seq and regions: each second block is free."""
    epoch = open_in(
        registry,
        name,
        capacity_tokens=BLOCK * BLOCKS,
        max_regions=BLOCKS,
        single_ordered_stream=True,
        copies_may_overlap=True,
    ).epoch
    with registry.owned(name, epoch) as learner:
        learner.pool.set_policy(learner.pool.policy().with_changes(step_tokens=1, safety_share=0.0))
        handles, seq = [], 0
        for start in range(0, BLOCKS, 1000):
            seq += 1
            ops = [Allocate(f"{i}", BLOCK - 1) for i in range(start, start + 1000)]
            answer = learner.apply(epoch, Batch(seq, seq - 1, [], ops))
            handles += [place.handle for place in answer.results]
        for start in range(0, BLOCKS // 2, 1000):
            seq += 1
            ops = [Free(h, End.ABORTED) for h in handles[::2][start : start + 1000]]
            learner.apply(epoch, Batch(seq, seq - 1, [], ops))
    return epoch, seq, handles[1::2]


def test_a_batch_is_planned_while_another_pool_is_served(registry):
    """C plans a batch of 1,000 moves; meanwhile Python serves the other pool from end to end.

    Threads do not take turns here unless one gives way, so a planner that held Python's lock,
    or a lock of all pools, would never be seen at work by the other thread.
    """
    epoch, last, regions = fragmented(registry, "busy")
    other = open_in(registry, "other").epoch
    used = [Used(handle, BLOCK) for handle in regions]
    ops = [Allocate(f"new-{i}", 2 * BLOCK - 1) for i in range(1000)]
    batch = Batch(last + 1, last, used, ops, pass_refused=True)
    planning, planned = threading.Event(), threading.Event()
    copies = []

    def plan():
        with registry.owned("busy", epoch) as learner:
            planning.set()
            copies.extend(learner.apply(epoch, batch).copies)
            planned.set()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e6)
    try:
        planner = threading.Thread(target=plan)
        planner.start()
        assert planning.wait(30)
        with registry.owned("other", other) as learner:
            learner.apply(other, Batch(1, 0, [], [Allocate("r", 10)]))
        served_meanwhile = not planned.is_set()
        planner.join()
    finally:
        sys.setswitchinterval(before)
    assert served_meanwhile
    assert len(copies) >= 500


# --- batches that take long ---

WAITING, HOPELESS, DRAIN_SECONDS = 4_000, 1_024, 3


def asking(name, tokens):
    return Allocate(name, tokens - 1, max_total_tokens=tokens)


def pool_that_plans_long(client):
    """Return a pool full of runs that wait, beside a hole, and a batch of hopeless requests.

    Two regions are pinned, so that the hole is a block too short for each of them.
    """
    hole = WAITING + 8
    pool = open_pool(
        client,
        "busy",
        capacity_tokens=(hole + WAITING + 2 + 64) * 16,
        max_regions=WAITING + 8,
        single_ordered_stream=False,
        policy=PolicyChange(name="elastic", safety_share=0),
    )
    large = pool.allocate(asking("hole", hole * 16)).handle
    handles = []
    for at in range(0, WAITING + 2, HOPELESS):
        names = range(at, min(at + HOPELESS, WAITING + 2))
        ops = [asking(f"{i}", 16) for i in names]
        handles += [place.handle for place in pool.apply(ops=ops).results]
    seq = pool.apply(ops=[Free(large, End.ABORTED, 0)]).seq
    for at in range(1, WAITING + 1, HOPELESS):
        ops = [Free(h, End.ABORTED, 0) for h in handles[at : min(at + HOPELESS, WAITING + 1)]]
        pool.apply(ops=ops, completed_seq=seq)
    used = [Used(handles[0], 1, True), Used(handles[-1], 1, True)]
    ops = [asking(f"long {i}", (hole + 1) * 16) for i in range(HOPELESS)]
    return pool, {"used": used, "ops": ops, "completed_seq": seq, "pass_refused": True}


def cpu_ticks(process):
    return sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().split()[13:15]))


def test_the_drain_keeps_its_time_while_a_pool_plans_all_the_time(servers):
    server = servers("--drain-seconds", str(DRAIN_SECONDS))
    with Client(server.target, retry_seconds=0, timeout_seconds=120) as client:
        pool, batch = pool_that_plans_long(client)

        def plan():
            with suppress(OdmaError):
                while True:
                    pool.apply(**batch)

        before = cpu_ticks(server.process)
        thread = threading.Thread(target=plan)
        thread.start()
        wait_for(lambda: cpu_ticks(server.process) >= before + 20, "planning")
        server.process.send_signal(signal.SIGTERM)
        server.process.communicate(timeout=DRAIN_SECONDS + 1)
        thread.join()
    assert server.process.returncode == 0


def test_a_pool_in_use_keeps_nobody_from_the_others(registry):
    """Its lock is held as by a long batch; the registry's is free for all who look."""
    epoch = open_in(registry, "held").epoch
    asked = threading.Event()

    def again():
        asked.set()
        open_in(registry, "held")

    with registry.owned("held", epoch):
        thread = threading.Thread(target=again)
        thread.start()
        assert asked.wait(30)
        for i in range(2):
            assert open_in(registry, f"p{i}").epoch
            with pytest.raises(PoolNotFoundError), registry.viewed(f"unknown {i}"):
                pass
        assert "held" in registry.names()
    thread.join()


def test_a_closing_registry_leaves_a_pool_in_use_alone(registry):
    epoch = open_in(registry, "held").epoch
    open_in(registry, "other")
    with registry.owned("held", epoch) as learner:
        registry.close(0)
        assert learner.apply(epoch, Batch(1, 0, [], [Allocate("r", 10)])).seq == 1
    with pytest.raises(UnavailableError), registry.owned("held", epoch):
        pass


# --- what is forgotten, and what a name keeps ---


def test_a_forgotten_pool_leaves_no_file_and_its_name_begins_anew(tmp_path):
    registry = registry_of(tmp_path, Clock())
    opened = open_in(registry, "a")
    with pytest.raises(PoolOpenError):
        registry.forget("a", opened.epoch)
    registry.close_epoch("a", opened.epoch)
    registry.forget("a", opened.epoch)
    registry.forget("a", opened.epoch)
    assert list(tmp_path.glob("a*")) == []
    assert registry.names() == []
    told = registry.telemetry.events.after(0).events[-1]
    assert (told.kind, told.reason) == (EventKind.FORGOTTEN, "by request")
    assert open_in(registry, "a").epoch > opened.epoch
    registry.close()


def test_a_late_wish_to_forget_does_not_meet_a_later_life(tmp_path):
    registry = registry_of(tmp_path, Clock())
    first = open_in(registry, "a")
    registry.close_epoch("a", first.epoch)
    second = open_in(registry, "a")
    registry.close_epoch("a", second.epoch)
    with pytest.raises(EpochError):
        registry.forget("a", first.epoch)
    assert registry.names() == ["a"]
    registry.close()


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ({}, {}, True),
        ({}, {"moves": types.MOVES_NONE}, False),
        ({"moves": types.MOVES_NONE}, {"moves": types.MOVES_OWN_GROWTH}, True),
        ({"moves": types.MOVES_NONE}, {}, False),
        ({"single_ordered_stream": True}, {}, False),
        ({}, {"ttl_seconds": 5}, True),
    ],
)
def test_a_policy_outlives_its_epoch_for_an_engine_of_its_kind(tmp_path, before, after, kept):
    registry = registry_of(tmp_path, Clock())
    share = TenantShare("chat", 0.9, 1.0)
    first = open_in(registry, "a", **before)
    with registry.steered("a", first.epoch) as learner:
        learner.set_policy(
            learner.pool.policy().with_changes(growth=3.5, safety_share=0.02, tenants=[share]),
            None,
            None,
        )
    registry.close_epoch("a", first.epoch)
    second = open_in(registry, "a", **after)
    with registry.viewed("a") as view:
        policy = view.pool.policy()
    assert (policy.growth == 3.5) == kept
    assert policy.name == second.policy_name
    assert policy.tenants == (share,)
    assert policy.safety_share <= 0.11
    told = registry.telemetry.events.after(0).events[-1]
    assert ("goes on" in told.reason) == kept
    assert ("of another kind" in told.reason) != kept
    registry.close()
