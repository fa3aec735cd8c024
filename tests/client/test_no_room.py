"""A call for which the service has no room is sent again as it is, and no batch is lost by it."""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager, nullcontext
from itertools import cycle

import pytest
from paths import JAVASCRIPT, ROOT
from running import BUILD_SECONDS, need_cpp, need_node, run
from servers import CAPACITY_TOKENS, PLANES, open_pool, places_of

from lab.robustness.proxy import NO_ROOM, Fate, Proxy
from odma_service.client import Allocate, AsyncClient, Client, Moves
from odma_service.errors import OdmaError
from odma_service.rpc.v1 import memory_service_pb2 as pb

FIELDS = {"planes": PLANES, "capacity_tokens": CAPACITY_TOKENS, "moves": Moves.ANY}
LOST = [*NO_ROOM, Fate.HOLD]
FATES = pytest.mark.parametrize("fate", LOST, ids=[fate.value for fate in LOST])
OVER = pytest.mark.parametrize("over", ["Apply", "Stream"])


@pytest.fixture
def network(server):
    with Proxy(server.target) as proxy:
        yield proxy


def insist_unchanged(network, over):
    """Batch 1 was sent three times, unchanged but perhaps for its number, and batch 2 once."""
    sent = [message.body for message in network.sent if message.rpc == over]
    if over == "Stream":
        batches = [pb.StreamRequest.FromString(body).apply for body in sent]
    else:
        batches = [pb.ApplyRequest.FromString(body) for body in sent]
    assert [batch.seq for batch in batches] == [1, 1, 1, 2]
    for batch in batches:
        batch.pool.number = 0
    assert batches[0] == batches[1] == batches[2]


def over_which(pool, over):
    return pool.stream() if over == "Stream" else nullcontext()


@OVER
@FATES
def test_a_batch_without_room_is_sent_again(network, service, name, over, fate):
    with Client(network.target) as client:
        pool = open_pool(client, name)
        network.order(over, fate, fate)
        with over_which(pool, over):
            answer = pool.apply(ops=[Allocate("r", 10)])
            assert pool.apply().seq == 2
    insist_unchanged(network, over)
    assert list(places_of(service, name).values()) == answer.results


@OVER
@FATES
def test_a_batch_that_has_no_room_in_time_is_kept(network, service, name, over, fate):
    with Client(network.target, retry_seconds=0) as client:
        pool = open_pool(client, name)
        network.order(over, fate, fate)
        with over_which(pool, over):
            for ask in (lambda: pool.apply(ops=[Allocate("r", 10)]), pool.resume):
                with pytest.raises(OdmaError) as caught:
                    ask()
                assert fate is Fate.HOLD or type(caught.value) is type(NO_ROOM[fate])
            with pytest.raises(OdmaError, match="resume"):
                pool.apply()
            answer = pool.resume()
            assert pool.apply().seq == 2
    insist_unchanged(network, over)
    assert list(places_of(service, name).values()) == answer.results


@asynccontextmanager
async def opened(network, name, over, **options):
    """Yield a pool of a loop, over which it sends."""
    async with AsyncClient(network.target, **options) as client:
        pool = await client.open_pool(name, **FIELDS)
        if over == "Apply":
            yield pool
            return
        async with pool.stream():
            yield pool


@OVER
@FATES
def test_a_batch_of_a_loop_is_sent_again(network, name, over, fate):
    async def work():
        async with opened(network, name, over) as pool:
            network.order(over, fate, fate)
            assert (await pool.apply(ops=[Allocate("r", 10)])).seq == 1
            assert (await pool.apply()).seq == 2

    asyncio.run(work())
    insist_unchanged(network, over)


@OVER
@FATES
def test_a_batch_of_a_loop_that_has_no_room_in_time_is_kept(network, name, over, fate):
    async def work():
        async with opened(network, name, over, retry_seconds=0) as pool:
            network.order(over, fate, fate)
            with pytest.raises(OdmaError):
                await pool.apply(ops=[Allocate("r", 10)])
            with pytest.raises(OdmaError):
                await pool.resume()
            assert (await pool.resume()).seq == 1
            assert (await pool.apply()).seq == 2

    asyncio.run(work())
    insist_unchanged(network, over)


def test_a_unary_call_without_room_is_sent_again(network, service, name):
    with Client(network.target) as client:
        pool = open_pool(client, name)
        network.order("Allocate", *NO_ROOM)
        place = pool.allocate(Allocate("r", 10))
    sent = [message.body for message in network.sent if message.rpc == "Allocate"]
    assert len(sent) == len(NO_ROOM) + 1
    assert len(set(sent)) == 1
    assert places_of(service, name) == {"r": place}


# --- engines in other languages ---

KEEPS = """
import { Client } from '%s';
const [target, name, over, retrySeconds] = process.argv.slice(1);
const client = new Client(target, { retrySeconds: Number(retrySeconds) });
const pool = await client.openPool({
  name, open_id: name, capacity_tokens: 4096, moves: 'MOVES_ANY',
  geometry: { planes: [{ count: 2, bytes_per_token: 64 }] },
});
if (over === 'Stream') pool.startStream();
const said = [];
const say = async (act) => {
  try { said.push((await act()).seq); } catch (error) { said.push(error.reason || error.message); }
};
await say(() => pool.apply({ ops: [{ allocate: { request_id: 'r', prompt_tokens: 10 } }] }));
while (pool.pending) await say(() => pool.resume());
await say(() => pool.apply({}));
console.log(said.join(' '));
pool.endStream();
client.close();
"""


@OVER
@pytest.mark.parametrize("fate", NO_ROOM, ids=[fate.value for fate in NO_ROOM])
@pytest.mark.parametrize("retry_seconds", [0, 30])
def test_the_javascript_client_keeps_its_batch(network, name, over, fate, retry_seconds):
    network.order(over, fate, fate)
    program = KEEPS % (JAVASCRIPT / "client.js").as_uri()
    node = (need_node(), "--input-type=module", "-e", program)
    told = run(*node, network.target, name, over, str(retry_seconds)).split()
    reason = NO_ROOM[fate].reason
    assert told == (["1", "2"] if retry_seconds else [reason, reason, "1", "2"])
    insist_unchanged(network, over)


class Busy:
    """A service that has no room for every seventh batch."""

    def __init__(self):
        self.bodies: list[bytes] = []
        self.refused: list[int] = []
        self._fates = cycle(NO_ROOM)

    def __call__(self, message):
        if message.rpc != "Apply":
            return Fate.PASS
        self.bodies.append(message.body)
        if len(self.bodies) % 7:
            return Fate.PASS
        self.refused.append(len(self.bodies) - 1)
        return next(self._fates)


def work_while_it_is_busy(target, *engine):
    busy = Busy()
    with Proxy(target, busy) as proxy:
        told = run(*engine, proxy.target, timeout=BUILD_SECONDS)
    assert "finished 100" in told
    assert len(busy.refused) > 3
    for refused in busy.refused:
        assert busy.bodies[refused] == busy.bodies[refused + 1]
    assert len(set(busy.bodies)) == len(busy.bodies) - len(busy.refused)


def test_the_python_engine_works_on(server):
    engine = ROOT / "examples" / "python" / "engine.py"
    work_while_it_is_busy(server.target, sys.executable, engine)


def test_the_javascript_engine_works_on(server):
    work_while_it_is_busy(server.target, need_node(), JAVASCRIPT / "engine.js")


@pytest.mark.timeout(BUILD_SECONDS + 100)
def test_the_cpp_engine_works_on(server):
    work_while_it_is_busy(server.target, need_cpp() / "engine")
