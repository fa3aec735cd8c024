"""Engines in three languages work through a network that delays, repeats and reorders.

Their authors did nothing for it: the clients say which process they are, and number what they send.
"""

from __future__ import annotations

import sys

import pytest
from paths import JAVASCRIPT, ROOT
from running import BUILD_SECONDS, need_cpp, need_node, run

from lab.robustness.proxy import Fate, Message, Proxy, Weather
from odma_service.rpc.v1 import memory_service_pb2 as pb


class Observed:
    """A network, and what came through it first."""

    def __init__(self, seed: int) -> None:
        self.weather = Weather(seed, rarity=20)
        self.batches: list[pb.ApplyRequest] = []
        self.openings: list[pb.OpenPoolRequest] = []

    def choose(self, message: Message) -> Fate:
        if message.rpc == "Apply":
            self.batches.append(pb.ApplyRequest.FromString(message.body))
        if message.rpc == "OpenPool":
            self.openings.append(pb.OpenPoolRequest.FromString(message.body))
            if len(self.openings) == 1:
                return Fate.LOSE_ANSWER
        return self.weather.choose(message)


def work_through_a_bad_network(target, *engine):
    seen = Observed(seed=5)
    with Proxy(target, seen.choose) as proxy:
        told = run(*engine, proxy.target)
        seen.weather.close()
    assert "finished 100" in told
    for count in seen.weather.counts.values():
        assert count > 0
    assert len({len(opening.instance) for opening in seen.openings} | {16}) == 1
    attempts = [opening.attempt for opening in seen.openings]
    assert len(attempts) > 1
    assert attempts == sorted(set(attempts))
    numbers = {batch.seq: batch.pool.number for batch in seen.batches}
    assert all(batch.pool.owner for batch in seen.batches)
    assert list(numbers.values()) == sorted(set(numbers.values()))


def test_the_python_engine_works(server):
    engine = ROOT / "examples" / "python" / "engine.py"
    work_through_a_bad_network(server.target, sys.executable, engine)


def test_the_javascript_engine_works(server):
    work_through_a_bad_network(server.target, need_node(), JAVASCRIPT / "engine.js")


@pytest.mark.timeout(BUILD_SECONDS + 100)
def test_the_cpp_engine_works(server):
    work_through_a_bad_network(server.target, need_cpp() / "engine")
