"""Clients in three languages keep the same contract: see tests/conformance/README.md."""

from __future__ import annotations

import json
import sys
from base64 import b64encode
from contextlib import nullcontext

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


KEYS = {"keys": b64encode(b"k" * 16).decode()}
ASKING = {"seq": 2, "completed_seq": 1, "used": [{"handle": 1, "used_tokens": 16}]}
ASKING["ops"] = [{"allocate": KEYS}]
PLACED = FIRST | {"handle": 2, "start_token": 32, "length_tokens": 32, "reused_tokens": 16}
GATHERS = {"handle": 2, "from_token": 0, "to_token": 32, "tokens": 16, "overlaps": False}


def gathering(*copies, place=PLACED, can=None):
    """Play an answer to one Allocate whose key is that of a running region's one granule."""
    opened = {"capacity_tokens": 64, "block_tokens": 16, "granule_tokens": 16}
    engine = Engine(OPEN | (can or {}), opened, None)
    engine.placed(FIRST, KEYS)
    result = {"place": place, "refusal": None}
    play(engine, ASKING, {"seq": 2, "results": [result], "copies": list(copies), "moved": []})
    return engine


def test_the_runner_finds_what_a_new_region_reuses():
    gathering(GATHERS)


@pytest.mark.parametrize(
    ("copies", "place"),
    [
        ([], PLACED),
        ([GATHERS | {"tokens": 15}], PLACED),
        ([GATHERS | {"from_token": 1}], PLACED),
        ([GATHERS], PLACED | {"start_token": 16}),
        ([GATHERS], PLACED | {"reused_tokens": 0}),
        ([GATHERS | {"handle": 3}], PLACED),
    ],
)
def test_the_runner_sees_what_is_not_there_to_be_reused(copies, place):
    with pytest.raises(Failure):
        gathering(*copies, place=place)


@pytest.mark.parametrize(("completed_seq", "fails"), [(1, True), (2, False)])
def test_the_runner_sees_memory_given_out_that_a_copy_may_still_read(completed_seq, fails):
    engine = gathering(GATHERS, can={"single_ordered_stream": False})
    engine.freed({"handle": 1})
    batch = {"seq": 3, "completed_seq": completed_seq, "used": [], "ops": [{"allocate": {}}]}
    taken = {"place": FIRST | {"handle": 3}, "refusal": None}
    with pytest.raises(Failure, match="before its completion") if fails else nullcontext():
        play(engine, batch, {"seq": 3, "results": [taken], "copies": [], "moved": []})
