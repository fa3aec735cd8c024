"""The client for asyncio does what the other one does, and nobody waits for it."""

from __future__ import annotations

import asyncio

import pytest
from conftest import CAPACITY_TOKENS, GEOMETRY, open_pool, wait_for

from odma_service.client import allocate, free
from odma_service.client.aio import AsyncClient
from odma_service.errors import (
    EpochError,
    HandleError,
    InvalidError,
    OdmaError,
    PoolOwnedError,
    RefusedError,
    UnavailableError,
)
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.values import End

POOL = {
    "geometry": GEOMETRY,
    "capacity_tokens": CAPACITY_TOKENS,
    "moves": types.MOVES_ANY,
    "single_ordered_stream": True,
}


def test_it_does_a_pools_whole_life(server, service, name):
    async def live():
        async with AsyncClient(server.target) as client:
            pool = await client.open_pool(name, open_id="mine", **POOL)
            answer = await pool.apply(ops=[allocate(f"r{i}", 10) for i in range(3)])
            first, second, third = (result.place for result in answer.results)
            await pool.apply(ops=[free(first.handle, End.FINISHED, 5)], completed_seq=1)
            assert (await pool.extend(third.handle, 200)).handle == third.handle
            assert await pool.free(third.handle, End.ABORTED) is False
            fourth = await pool.allocate("r4", 10)
            assert (await pool.keep_alive()).ttl_seconds == 60
            again = await client.open_pool(name, open_id="mine", **POOL)
            reconciled = await again.reconcile([fourth.handle])
            assert list(reconciled.freed) == [second.handle]
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
                await asyncio.gather(*(pool.allocate(f"r{i}", 3000) for i in range(2)))
            with pytest.raises(HandleError):
                await pool.free(2**50, End.ABORTED)

    asyncio.run(fail())


def test_an_answer_that_was_lost_or_not_waited_for_is_asked_for_again(wire, service, name):
    async def lose():
        async with AsyncClient(wire.target, timeout_seconds=5) as client:
            pool = await client.open_pool(name, **POOL)
            wire.hold_answers()
            lost = asyncio.create_task(pool.apply(ops=[allocate("r", 10)]))
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
