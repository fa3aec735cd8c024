"""Clients in three languages keep the same contract: see tests/conformance/README.md."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from fcntl import LOCK_EX, flock
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest
from runner import FILE, Engine, Failure, fill, match

ROOT = Path(__file__).parents[2]
JAVASCRIPT = ROOT / "examples" / "javascript"
CPP = ROOT / "build" / "cpp"
CPP_PACKAGES = ("grpc++", "protobuf", "nlohmann_json")
BUILD_SECONDS = 500


def run(*command: str | Path, timeout: float = 100) -> str:
    """Return what a program prints; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def miss_client(missing: str) -> NoReturn:
    """Skip a test for want of a client's packages, or fail if they must not be missing."""
    if os.environ.get("ODMA_REQUIRE_CLIENTS"):
        pytest.fail(missing)
    pytest.skip(missing)


def need_node() -> str:
    """Return the path of node, whose packages are there."""
    node = shutil.which("node")
    if node and (JAVASCRIPT / "node_modules" / "@grpc").is_dir():
        return node
    miss_client("no JavaScript client: `make examples/javascript/node_modules/.installed` gets it")


@cache
def need_cpp() -> Path:
    """Return the folder of the C++ programs, built if they are not, or not any more."""
    tools = ("g++", "make", "protoc", "grpc_cpp_plugin", "pkg-config")
    there = (
        all(map(shutil.which, tools))
        and not subprocess.run(["pkg-config", "--exists", *CPP_PACKAGES], check=False).returncode
    )
    if not there:
        miss_client("no C++ client: `make deps` gets what it needs from Debian")
    command = ["make", "-s", f"-j{os.cpu_count()}", "-C", ROOT / "examples" / "cpp"]
    CPP.mkdir(parents=True, exist_ok=True)
    with (CPP / "lock").open("w") as lock:  # tests may run in several processes
        flock(lock, LOCK_EX)
        run(*command, "CXXFLAGS=-O0 -Werror", timeout=BUILD_SECONDS)
    return CPP


def test_the_python_client_keeps_the_contract(server):
    told = run(sys.executable, FILE.with_name("runner.py"), server.target)
    assert told.count("\nok ") + 1 == len(json.loads(FILE.read_text())["scenarios"])


def test_the_javascript_client_keeps_the_contract(server):
    told = run(need_node(), FILE.with_name("conformance.js"), server.target)
    assert told.count("\nok ") + 1 == len(json.loads(FILE.read_text())["scenarios"])


@pytest.mark.timeout(BUILD_SECONDS + 100)
def test_the_cpp_client_keeps_the_contract(server):
    told = run(need_cpp() / "conformance", FILE, server.target)
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
MOVED = {"handle": 1, "start_token": 32, "length_tokens": 16}
COPY = {"handle": 1, "from_token": 0, "to_token": 32, "tokens": 4, "overlaps": False}


def engine(**can):
    """Return an engine with a region at 0 whose first 4 tokens are written."""
    engine = Engine(OPEN | can, {"capacity_tokens": 64, "block_tokens": 16}, None)
    engine.placed({"handle": 1, "start_token": 0, "length_tokens": 16})
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
