"""The client for asyncio does what the other one does, and nobody waits for it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from servers import CAPACITY_TOKENS, PATIENCE_SECONDS, PLANES, open_pool, places_of, wait_for
from watching import kinds, small_service

from odma_service.client import Client, chained_keys
from odma_service.client.aio import AsyncClient, AsyncPoolClient
from odma_service.errors import (
    EpochError,
    HandleError,
    InvalidError,
    NothingLearntError,
    OdmaError,
    PoolOpenError,
    PoolOwnedError,
    RefusedError,
    StreamLimitError,
    StreamReplacedError,
    UnavailableError,
)
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.service.door.watchers import MOST_WATCHERS
from odma_service.service.watch.events import EventKind
from odma_service.values import (
    Allocate,
    Copy,
    End,
    Extend,
    Free,
    Freed,
    Moves,
    Place,
    PolicyChange,
    Used,
)

POOL = {
    "planes": PLANES,
    "capacity_tokens": CAPACITY_TOKENS,
    "moves": Moves.ANY,
    "single_ordered_stream": True,
}


def test_it_does_a_pools_whole_life(server, service, name):
    async def live():
        async with AsyncClient(server.target) as client:
            pool = await client.open_pool(name, open_id="mine", **POOL)
            answer = await pool.apply(ops=[Allocate(f"r{i}", 10) for i in range(3)])
            first, second, third = answer.results
            await pool.apply(ops=[Free(first.handle, End.FINISHED, 5)], completed_seq=1)
            assert (await pool.extend(Extend(third.handle, 200))).handle == third.handle
            assert await pool.free(Free(third.handle, End.ABORTED)) == Freed()
            fourth = await pool.allocate(Allocate("r4", 10))
            assert (await pool.keep_alive()).ttl_seconds == 60
            again = await client.open_pool(name, open_id="mine", **POOL)
            reconciled = await again.reconcile([fourth.handle], completed_seq=2)
            assert reconciled.freed == [second.handle]
            assert (await again.apply()).seq == 3
            assert (await client.get_pool(name)).summary.regions == 1
            await again.close_pool()
            with pytest.raises(EpochError):
                await pool.apply()

    asyncio.run(live())
    assert service.get_pool(name).summary.regions == 0


def test_errors_are_those_of_the_other_client(server, service, name):
    open_pool(service, name)

    async def fail():
        async with AsyncClient(server.target) as client:
            with pytest.raises(PoolOwnedError):
                await client.open_pool(name, **POOL)
            pool = await client.open_pool(name, take_over=True, **POOL)
            with pytest.raises(InvalidError, match="completed_seq"):
                await pool.apply(completed_seq=7)
            assert (await pool.apply()).seq == 1
            with pytest.raises(RefusedError):
                await asyncio.gather(*(pool.allocate(Allocate(f"r{i}", 3000)) for i in range(2)))
            with pytest.raises(HandleError):
                await pool.free(Free(2**50, End.ABORTED))

    asyncio.run(fail())


def test_an_answer_that_was_lost_or_not_waited_for_is_asked_for_again(wire, service, name):
    async def lose():
        async with AsyncClient(wire.target, timeout_seconds=5) as client:
            pool = await client.open_pool(name, **POOL)
            wire.hold_answers()
            lost = asyncio.create_task(pool.apply(ops=[Allocate("r", 10)]))
            await asyncio.to_thread(
                wait_for, lambda: service.get_pool(name).last_seq == 1, "the batch"
            )
            lost.cancel()
            with pytest.raises(asyncio.CancelledError):
                await lost
            with pytest.raises(OdmaError, match="resume"):
                await pool.apply()
            wire.lose_answers()
            assert (await pool.resume()).replayed
            assert (await pool.apply()).seq == 2

    asyncio.run(lose())


def test_nobody_there_is_an_error_in_time():
    async def call():
        async with AsyncClient("127.0.0.1:1", retry_seconds=0.1) as client:
            with pytest.raises(UnavailableError):
                await client.get_pool("p")

    asyncio.run(call())


# --- batches over a stream ---


def test_batches_over_a_stream_are_done_in_order(server, service, name):
    async def send():
        async with AsyncClient(server.target) as client:
            pool = await client.open_pool(name, **POOL)
            async with pool.stream():
                answers = [await pool.apply(ops=[Allocate(f"r{i}", 10)]) for i in range(20)]
            assert [answer.seq for answer in answers] == list(range(1, 21))
            assert (await pool.apply()).seq == 21  # a call again
            return {answer.results[0].handle for answer in answers}

    assert asyncio.run(send()) == {p.handle for p in places_of(service, name).values()}


def test_what_ended_is_used_again_by_calls_and_over_a_stream(server, service, name):
    keys = chained_keys(range(128), 64, b"")

    async def go():
        async with AsyncClient(server.target) as client:
            pool = await client.open_pool(name, **POOL, granule_tokens=64)
            first = await pool.allocate(Allocate("first", 130, keys=keys))
            await pool.free(Free(first.handle, End.FINISHED, 1, keep_tokens=130))
            async with pool.stream():
                asked = [Allocate("again", 130, keys=keys)]
                again = (await pool.apply(ops=asked)).results[0]
                used = [Used(again.handle, 130, shareable_tokens=130)]
                copied = await pool.apply(used, [Allocate("more", 130, keys=keys)])
            return first, again, copied

    first, again, copied = asyncio.run(go())
    assert (again.start_token, again.reused_tokens) == (first.start_token, 128)
    more = copied.results[0]
    assert more.reused_tokens == 128
    assert copied.copies == [Copy(more.handle, again.start_token, more.start_token, 128, False)]


def test_an_engine_loses_no_step_while_the_server_is_killed_in_mid_stream(servers):
    server, steps, kills = servers(), 120, 3

    async def play(client, passed):
        pool, places = await client.open_pool("p", **POOL), {}
        async with pool.stream():
            for step in range(steps):
                victims = [places.pop(request) for request in list(places)[: len(places) // 8]]
                answer = await pool.apply(
                    used=[Used(place.handle, 20) for place in places.values()],
                    ops=[Free(victim.handle, End.FINISHED, 9) for victim in victims]
                    + [Allocate(f"r{step}", 20, max_total_tokens=200)],
                    completed_seq=pool.seq,
                )
                moved = {place.handle: place for place in answer.moved}
                places = {r: moved.get(place.handle, place) for r, place in places.items()}
                if isinstance(answer.results[-1], Place):
                    places[f"r{step}"] = answer.results[-1]
                passed.release()
        return pool.seq, places

    async def fail():
        passed = asyncio.Semaphore(0)
        async with AsyncClient(server.target, retry_seconds=60) as client:
            playing = asyncio.create_task(play(client, passed))
            for _ in range(kills):
                for _ in range(steps // (kills + 1)):
                    await passed.acquire()
                await asyncio.to_thread(server.restart)  # kill -9, while batches are under way
            return await playing

    seq, places = asyncio.run(asyncio.wait_for(fail(), 90))
    with Client(server.target) as service:
        assert seq == service.get_pool("p").last_seq == steps
        assert places_of(service, "p") == places


def test_a_connection_that_breaks_between_batches_is_not_noticed(wire, name):
    """Core tells a broken stream in several ways, by how far it has noticed."""

    async def cut():
        async with AsyncClient(wire.target) as client:
            pool = await client.open_pool(name, **POOL)
            async with pool.stream():
                for turn in range(20):
                    await pool.apply()
                    wire.lose_answers()
                    for _ in range(turn):
                        await asyncio.sleep(0)
                    assert (await pool.apply()).seq == pool.seq == 2 * turn + 2

    asyncio.run(cut())


def test_a_batch_cancelled_in_mid_stream_is_resumed_over_another(wire, service, name):
    async def lose():
        async with AsyncClient(wire.target) as client:
            pool = await client.open_pool(name, **POOL)
            async with pool.stream():
                await pool.apply()
                wire.hold_answers()
                lost = asyncio.create_task(pool.apply(ops=[Allocate("r", 10)]))
                await asyncio.to_thread(
                    wait_for, lambda: service.get_pool(name).last_seq == 2, "the batch"
                )
                lost.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await lost
                with pytest.raises(OdmaError, match="resume"):
                    await pool.apply()
                wire.lose_answers()
                assert (await pool.resume()).replayed
                assert (await pool.apply()).seq == 3

    asyncio.run(lose())


def test_a_late_answer_is_given_up_and_can_be_had_without_the_stream(wire, service, name):
    async def wait():
        async with AsyncClient(wire.target, timeout_seconds=2, retry_seconds=0) as client:
            pool = await client.open_pool(name, **POOL)
            async with pool.stream():
                await pool.apply()
                wire.hold_answers()
                with pytest.raises(UnavailableError, match="no answer"):
                    await pool.apply(ops=[Allocate("r", 10)])
                wire.lose_answers()
            return pool

    pool = asyncio.run(wait())
    assert (pool.seq, pool.pending.seq) == (1, 2)
    assert service.call(service.memory.Apply, pool.pending).replayed


def test_what_ends_a_stream_is_raised_and_the_next_batch_opens_another(server, service, name):
    async def err():
        async with AsyncClient(server.target) as client:
            pool = await client.open_pool(name, open_id="mine", **POOL)
            twin = AsyncPoolClient(client, pool.response)
            async with pool.stream(), twin.stream():
                await pool.apply()
                with pytest.raises(InvalidError, match=r"used\[0\]"):
                    await pool.apply(used=[Used(2**40, 1)])
                assert (await pool.apply()).seq == 2
                await twin.reconcile([])
                await twin.apply()
                with pytest.raises(StreamReplacedError):
                    await pool.apply()
                new = await client.open_pool(name, take_over=True, **POOL)
                with pytest.raises(EpochError):
                    await twin.apply()
                assert (await new.apply()).seq == 1

    asyncio.run(err())


def test_waiting_for_a_batch_keeps_nobody_else_waiting(wire, server, name):
    async def wait():
        async with AsyncClient(wire.target) as held, AsyncClient(server.target) as client:
            slow, quick = (
                await held.open_pool(name, **POOL),
                await client.open_pool(f"{name}-q", **POOL),
            )
            async with slow.stream(), quick.stream():
                wire.hold_answers()
                waiting = asyncio.create_task(slow.apply())
                assert [(await quick.apply()).seq for _ in range(3)] == [1, 2, 3]
                assert not waiting.done()
                wire.lose_answers()
                assert (await waiting).seq == 1

    asyncio.run(wait())


# --- events ---


async def some(answers, count):
    """Return the next answers of a watch."""
    return [await anext(answers) for _ in range(count)]


def test_it_watches_what_happens_in_order_and_goes_on_behind_its_cursor(server, service, name):
    async def watch():
        async with AsyncClient(server.target) as client:
            async with aclosing(client.watch(name)) as answers:
                greeting = await anext(answers)
                assert not greeting.HasField("event")
                (await asyncio.to_thread(open_pool, service, name)).close_pool()
                first = await anext(answers)
            again = client.watch(name, greeting.cursor, greeting.incarnation)
            async with aclosing(again):
                told = await some(again, 3)
            assert kinds(told[1:]) == ["OPENED", "CLOSED"]
            assert told[1] == first
            assert not any(answer.lost for answer in told)
            bad = client.watch(name, 3)
            async with aclosing(bad):
                with pytest.raises(InvalidError, match="cursor"):
                    await anext(bad)

    asyncio.run(watch())


def test_a_watch_whose_connection_breaks_misses_nothing(wire, service, name):
    async def watch():
        async with AsyncClient(wire.target) as client, aclosing(client.watch(name)) as answers:
            greeting = await anext(answers)
            wire.hold_answers()
            (await asyncio.to_thread(open_pool, service, name)).close_pool()
            wire.lose_answers()
            again, *told = await some(answers, 3)
            assert again.incarnation == greeting.incarnation
            assert kinds(told) == ["OPENED", "CLOSED"]
            assert not any(answer.lost for answer in (again, *told))

    asyncio.run(watch())


def test_a_killed_server_is_told_as_a_loss_and_found_pools_are_told_of(servers, name):
    server = servers()

    async def watch():
        async with AsyncClient(server.target) as client, aclosing(client.watch()) as answers:
            await anext(answers)
            await client.open_pool(name, **POOL)
            before = await anext(answers)
            await asyncio.to_thread(server.restart)
            greeting, resumed = await some(answers, 2)
            assert greeting.lost
            assert greeting.incarnation != before.incarnation
            assert kinds([resumed]) == ["RESUMED"]

    asyncio.run(watch())


def test_a_watcher_that_reads_late_fills_nobodys_memory_and_is_told_what_it_lost(tmp_path):
    events = 5_000

    async def watch(telemetry, target):
        async with AsyncClient(target) as client, aclosing(client.watch()) as answers:
            await anext(answers)
            for i in range(events):
                telemetry.tell(EventKind.OPENED, "p", i + 1, reason="x" * 1_000)
            told = [await anext(answers)]
            while told[-1].cursor < telemetry.events.last:
                told.append(await anext(answers))
            cursors = [answer.cursor for answer in told if answer.HasField("event")]
            assert cursors == sorted(set(cursors))
            assert len(cursors) < events  # flow control held back what was not read
            assert any(answer.lost for answer in told)

    with small_service(tmp_path, kept=4) as (telemetry, target):
        asyncio.run(watch(telemetry, target))


def test_a_watcher_that_stops_gives_its_place_back(servers):
    server = servers()

    async def admitted(client):
        async with aclosing(client.watch()) as answers:
            try:
                return await anext(answers)
            except StreamLimitError:
                return None

    async def watch():
        async with AsyncClient(server.target) as client, asyncio.timeout(PATIENCE_SECONDS):
            for _ in range(2 * MOST_WATCHERS):
                while not await admitted(client):
                    await asyncio.sleep(0.05)  # the service notices within a second

    asyncio.run(watch())


def test_a_watch_of_nobody_ends_in_time():
    async def watch():
        async with AsyncClient("127.0.0.1:1", retry_seconds=0.1) as client:
            with pytest.raises(UnavailableError):
                await anext(client.watch())

    asyncio.run(watch())


def test_an_operator_steers_closes_and_forgets_a_pool(server, service, name):
    pool = open_pool(service, name)
    ref = types.PoolRef(name=name, epoch=pool.ref.epoch)

    async def steer():
        async with AsyncClient(server.target) as operator:
            version = (await operator.get_pool(name)).policy.version
            change = PolicyChange(safety_share=0.1)
            policy = await operator.set_policy(ref, change, expected_version=version)
            assert policy.safety_share == 0.1
            with pytest.raises(NothingLearntError):
                await operator.recalibrate(ref, expected_version=policy.version)
            with pytest.raises(PoolOpenError):
                await operator.forget_pool(ref)
            await operator.close_pool(ref)
            await operator.forget_pool(ref)
            pools = (await operator.list_pools()).pools
            assert name not in [summary.pool.name for summary in pools]

    asyncio.run(steer())
