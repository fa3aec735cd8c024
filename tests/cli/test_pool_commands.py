"""`odma pool`, `policy` and `recalibrate`: what an operator does, against a real server."""

from __future__ import annotations

import json

import pytest
from running import odma
from servers import open_pool

from odma_service.errors import EpochError, PoolNotFoundError
from odma_service.values import Allocate, End, Free, PolicyChange


@pytest.fixture
def ask(server):
    """Return how to run a command against the server."""

    def run(*words, code=0):
        done = odma(*words, "--target", server.target)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    return run


def test_a_live_owner_is_closed_only_on_purpose(service, ask, name):
    pool = open_pool(service, name)
    assert "--live" in ask("pool", "close", name, code=2)
    assert pool.apply().seq == 1
    assert ask("pool", "close", name, "--live") == f"closed {name}, epoch {pool.ref.epoch}\n"
    with pytest.raises(EpochError):
        pool.apply()


def test_a_pool_is_forgotten_once_it_is_closed(service, ask, name):
    pool = open_pool(service, name)
    assert "close it first" in ask("pool", "forget", name, code=2)
    pool.close_pool()
    ask("pool", "forget", name)
    with pytest.raises(PoolNotFoundError):
        service.get_pool(name)
    assert name not in ask("pool", "list")
    assert "no pool is named" in ask("pool", "forget", name, code=2)


def test_a_list_and_a_picture_are_those_of_status(service, ask, name):
    open_pool(service, name)
    listed = json.loads(ask("pool", "list", "--json"))["pools"]
    assert [pool["state"] for pool in listed if pool["pool"]["name"] == name] == ["POOL_STATE_OPEN"]
    assert json.loads(ask("pool", "show", name, "--json"))["summary"]["pool"]["name"] == name


def test_a_policy_is_shown_and_changed_with_the_shares_of_tenants(service, ask, name):
    open_pool(service, name)
    words = ("--safety-share", "0.1", "--tenant", "chat=0.4:0.7", "--tenant", "batch=0.2")
    told = json.loads(ask("policy", "set", name, *words, "--json"))
    assert (told["name"], told["safety_share"]) == ("elastic", 0.1)
    assert [tenant["name"] for tenant in told["tenants"]] == ["chat", "batch"]
    assert told == json.loads(ask("policy", "show", name, "--json"))
    assert "0.4 to 0.7" in ask("policy", "show", name)
    told = json.loads(ask("policy", "set", name, "--record", "odma", "--clear-tenants", "--json"))
    assert (told["name"], told["tenants"]) == ("odma", [])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "nothing to change"),
        (("--safety-share", "2"), "safety_share"),
        (("--tenant", "chat"), "NAME=GUARANTEED"),
        (("--record", "greedy"), "static, s3, odma, elastic"),
    ],
)
def test_a_bad_policy_is_refused_and_the_old_one_stays(service, ask, name, words, why):
    version = open_pool(service, name).response.policy_version
    assert why in ask("policy", "set", name, *words, code=2)
    assert service.get_pool(name).policy.version == version


def test_limits_are_found_anew_or_only_compared(service, ask, name):
    pool = open_pool(service, name, policy=PolicyChange(name="odma"))
    assert "completions" in ask("recalibrate", name, code=2)
    for i in range(40):
        place = pool.allocate(Allocate(f"r{i}", 16))
        pool.free(Free(place.handle, End.FINISHED, 100 + i))
    version = service.get_pool(name).policy.version
    tried = json.loads(ask("recalibrate", name, "--dry-run", "--json"))
    assert not tried["installed"]
    assert service.get_pool(name).policy.version == version
    done = json.loads(ask("recalibrate", name, "--json"))
    assert done["installed"]
    assert done["after"] == tried["after"]
    assert "bucket limits" in ask("recalibrate", name, "--dry-run")
