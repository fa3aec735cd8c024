"""Clients in three languages keep the same contract: see tests/conformance/README.md."""

from __future__ import annotations

import json
import sys

import pytest
from runner import FILE, Engine, Failure, fill, match
from running import BUILD_SECONDS, need_cpp, need_node, run


def test_the_python_client_keeps_the_contract(server):
    told = run(sys.executable, FILE.with_name("runner.py"), server.target)
    assert told.count("\nok ") + 1 == len(json.loads(FILE.read_text())["scenarios"])


def test_the_javascript_client_keeps_the_contract(server):
    told = run(need_node(), FILE.with_name("runner.js"), server.target)
    assert told.count("\nok ") + 1 == len(json.loads(FILE.read_text())["scenarios"])


@pytest.mark.timeout(BUILD_SECONDS + 100)
def test_the_cpp_client_keeps_the_contract(server):
    told = run(need_cpp() / "runner", FILE, server.target)
    assert told.count("\nok ") + 1 == len(json.loads(FILE.read_text())["scenarios"])


def test_scenarios_have_names_of_their_own_and_known_parts():
    script = json.loads(FILE.read_text())
    names = [scenario["name"] for scenario in script["scenarios"]]
    assert len(set(names)) == len(names) >= 25
    for scenario in script["scenarios"]:
        for step in scenario["steps"]:
            assert "play" not in step or step["play"] in script["parts"]


def test_a_name_is_bound_once_and_compared_from_then_on():
    names = {}
    match({"a": "$x", "b": {"$range": [1, 9], "$as": "$y"}}, {"a": 5, "b": 7, "c": 0}, names, "")
    assert fill(["$x", {"$plus": ["$y", 1]}, {"$times": [2, "ab"]}], names) == [5, 8, "abab"]
    with pytest.raises(Failure):
        match("$x", 6, names, "")


@pytest.mark.parametrize(
    ("pattern", "value"),
    [
        (1, True),
        ([1], [1, 2]),
        ({"a": 1}, {"b": 1}),
        ({"a": {}}, {"a": None}),
        ({"$in": [1, 2]}, 3),
        ({"$range": [1, 2]}, 3),
        ({"$contains": "x"}, "abc"),
        ({"$not": 1}, 1),
        ({"$unordered": [1, 2]}, [1, 1]),
    ],
)
def test_what_does_not_match_fails(pattern, value):
    with pytest.raises(Failure):
        match(pattern, value, {}, "")


OPEN = {"moves": "MOVES_ANY", "single_ordered_stream": True, "copies_may_overlap": True}
BATCH = {"seq": 2, "completed_seq": 1, "ops": [], "used": [{"handle": 1, "used_tokens": 4}]}
FIRST = {
    "handle": 1,
    "start_token": 0,
    "length_tokens": 16,
    "reused_tokens": 0,
    "shared_start_token": 0,
    "shared_tokens": 0,
}
MOVED = FIRST | {"start_token": 32}
COPY = {"handle": 1, "from_token": 0, "to_token": 32, "tokens": 4, "overlaps": False}


def engine(**can):
    """Return an engine with a region at 0 whose first 4 tokens are written."""
    opened = {"capacity_tokens": 64, "block_tokens": 16, "granule_tokens": 0}
    engine = Engine(OPEN | can, opened, None)
    engine.placed(FIRST, {})
    return engine


def answer(*copies, moved=MOVED):
    return {"seq": 2, "results": [], "copies": list(copies), "moved": [moved]}


def play(engine, batch, answer):
    engine.applied(batch, answer)
    engine.check()


def test_the_runner_sees_every_token_at_its_new_place():
    play(engine(), BATCH, answer(COPY))


@pytest.mark.parametrize(
    ("can", "batch", "given"),
    [
        ({}, {}, answer()),
        ({}, {}, answer(COPY | {"tokens": 3})),
        ({}, {}, answer(COPY | {"tokens": 5})),
        ({}, {}, answer(COPY | {"to_token": 31})),
        ({}, {}, answer(COPY | {"overlaps": True})),
        ({}, {}, answer(COPY, moved=MOVED | {"start_token": 40})),
        ({}, {"max_copy_tokens": 3}, answer(COPY)),
        ({}, {"used": [{"handle": 1, "used_tokens": 4, "pinned": True}]}, answer(COPY)),
        ({"moves": "MOVES_OWN_GROWTH"}, {}, answer(COPY)),
        ({"single_ordered_stream": False}, {}, answer(COPY, COPY | {"from_token": 32})),
    ],
)
def test_the_runner_sees_what_an_engine_must_not_be_told(can, batch, given):
    one = engine(**can)
    with pytest.raises(Failure):
        play(one, BATCH | batch, given)
