"""Watch: events in order, resumable, told what is lost, and nobody waits for a watcher."""

from __future__ import annotations

import json
import subprocess
from itertools import islice

import grpc
import pytest
from servers import open_pool, wait_for
from watching import kinds, small_service

from odma_service.client import Client, PoolClient
from odma_service.client.local import ODMA
from odma_service.errors import InvalidError, StreamLimitError, UnavailableError
from odma_service.rpc.v1 import pool_service_pb2 as pb
from odma_service.rpc.v1.pool_service_pb2_grpc import (
    PoolServiceStub,
)
from odma_service.service.door.watchers import MOST_WATCHERS
from odma_service.service.watch.events import EventKind
from odma_service.values import Allocate, End, Free, PolicyChange


def test_every_kind_has_the_number_that_the_proto_gives_it():
    assert {f"EVENT_KIND_{kind.name}": kind.value for kind in EventKind} == {
        name: number for name, number in pb.EventKind.items() if number
    }


def test_a_watcher_is_greeted_and_then_told_what_happens_in_order(service, name):
    answers = service.watch(name)
    greeting = next(answers)
    assert greeting.incarnation
    assert not greeting.HasField("event")
    pool = open_pool(service, name)
    pool.set_policy(PolicyChange(safety_share=0.2))
    taken = open_pool(service, name, take_over=True)
    taken.close_pool()
    told = list(islice(answers, 5))
    assert kinds(told) == ["OPENED", "POLICY_SET", "TAKEN_OVER", "OPENED", "CLOSED"]
    assert {answer.event.pool.name for answer in told} == {name}
    assert told[0].event.pool.epoch == pool.ref.epoch == told[2].event.pool.epoch
    assert told[1].event.policy_version == pool.response.policy_version + 1
    cursors = [answer.cursor for answer in told]
    assert cursors == sorted(set(cursors))
    answers.close()


def test_without_a_name_every_pool_is_watched(service, name):
    answers = service.watch()
    next(answers)
    for suffix in "ab":
        open_pool(service, name + suffix)
    told = []
    while len(told) < 2:
        answer = next(answers)
        if answer.event.pool.name.startswith(name):
            told.append(answer)
    assert kinds(told) == ["OPENED", "OPENED"]
    answers.close()


def test_a_recalibration_says_why_and_the_safety_share_what_it_is(service, name):
    answers = service.watch(name)
    next(answers)
    change = PolicyChange(name="odma", limits_tokens=[1024, 4096])
    pool = open_pool(service, name, policy=change)
    for i in range(40):
        pool.free(
            Free(
                pool.allocate(Allocate(f"r{i}", 16, max_total_tokens=400)).handle, End.FINISHED, 40
            )
        )
    pool.recalibrate()
    opened, recalibrated = islice(answers, 2)
    assert kinds([opened, recalibrated]) == ["OPENED", "RECALIBRATED"]
    assert recalibrated.event.reason.startswith("asked for: of ")
    assert "limits 1024 4096 -> " in recalibrated.event.reason
    answers.close()


def test_a_stale_pool_and_its_owners_return_are_told(servers, name):
    with Client(servers().target) as service:
        answers = service.watch(name)
        next(answers)
        pool = open_pool(service, name, ttl_seconds=1)
        assert kinds(islice(answers, 2)) == ["OPENED", "STALE"]
        pool.apply()
        assert kinds(islice(answers, 1)) == ["REVIVED"]
        answers.close()


def test_a_watcher_goes_on_behind_its_cursor_and_misses_nothing(service, name):
    first = service.watch(name)
    greeting = next(first)
    first.close()
    open_pool(service, name).close_pool()
    answers = service.watch(name, greeting.cursor, greeting.incarnation)
    told = list(islice(answers, 3))
    assert [answer.lost for answer in told] == [False] * 3
    assert kinds(told[1:]) == ["OPENED", "CLOSED"]
    answers.close()


def test_a_restart_is_told_as_a_loss_and_found_pools_are_told_of(servers, name):
    server = servers()
    with Client(server.target) as service:
        answers = service.watch()
        next(answers)
        open_pool(service, name)
        before = next(answers)
        server.restart()
        greeting, resumed = islice(answers, 2)  # the client watches again by itself
        assert greeting.lost
        assert greeting.incarnation != before.incarnation
        assert kinds([resumed]) == ["RESUMED"]
        answers.close()


@pytest.mark.parametrize(
    ("cursor", "incarnation"), [(3, ""), (2**40, None)], ids=["without", "not given out"]
)
def test_a_cursor_that_means_nothing_is_refused(service, cursor, incarnation):
    if incarnation is None:
        answers = service.watch()
        incarnation = next(answers).incarnation
        answers.close()
    with pytest.raises(InvalidError, match="cursor"):
        next(service.watch("", cursor, incarnation))


def test_a_watcher_that_is_too_slow_is_told_and_goes_on_with_what_there_is(tmp_path):
    with small_service(tmp_path, kept=4) as (telemetry, target), Client(target) as service:
        answers = service.watch()
        greeting = next(answers)
        answers.close()
        for i in range(10):
            telemetry.tell(EventKind.OPENED, "p", i + 1)
        answers = service.watch("", greeting.cursor, greeting.incarnation)
        told = list(islice(answers, 6))
        assert [answer.lost for answer in told] == [False, True] + [False] * 4
        assert [answer.event.pool.epoch for answer in told[2:]] == [7, 8, 9, 10]
        answers.close()


def test_watchers_are_bounded_and_take_no_thread_from_calls(servers, name):
    server = servers("--workers", "2")
    own = [("grpc.use_local_subchannel_pool", 1)]  # a connection has a bounded number of streams
    channels = [grpc.insecure_channel(server.target, own) for _ in range(5)]
    streams = [PoolServiceStub(channels[i % 4]).Watch(pb.WatchRequest()) for i in range(32)]
    assert len(streams) == MOST_WATCHERS
    for stream in streams:
        next(stream)
    with Client(server.target, retry_seconds=1) as service:
        assert open_pool(service, name).apply().seq == 1
        with pytest.raises(StreamLimitError):
            next(service.watch())
    streams[0].cancel()

    def is_admitted() -> bool:
        call = PoolServiceStub(channels[4]).Watch(pb.WatchRequest())
        try:
            next(call)
        except grpc.RpcError:
            return False
        call.cancel()
        return True

    wait_for(is_admitted, "a free place")
    for channel in channels:
        channel.close()


def test_a_service_that_drains_ends_the_streams(servers):
    server = servers()
    with Client(server.target, retry_seconds=0) as service:
        answers = service.watch()
        next(answers)
        assert server.terminate() == 0
        with pytest.raises(UnavailableError, match="draining"):
            next(answers)


def test_an_engine_watches_its_own_pools_only_and_an_operator_all(servers, tmp_path):
    tokens = {who: f"{who}-token-{'x' * 16}" for who in ("one", "two", "boss")}
    file = tmp_path / "tokens.toml"
    file.write_text(
        "".join(
            f'[[identity]]\nname = "{who}"\ntoken = "{token}"\n'
            f'role = "{"operator" if who == "boss" else "engine"}"\n'
            for who, token in tokens.items()
        )
    )
    file.chmod(0o600)
    server = servers("--token-file", str(file))
    one, two, boss = (Client(server.target, token=tokens[who]) for who in tokens)
    mine, all_of_them = one.watch(), boss.watch()
    next(mine), next(all_of_them)
    open_pool(two, "of-two")
    open_pool(one, "of-one").close_pool()
    assert [answer.event.pool.name for answer in islice(mine, 2)] == ["of-one"] * 2
    assert [a.event.pool.name for a in islice(all_of_them, 3)] == ["of-two"] + ["of-one"] * 2
    for client in (one, two, boss):
        client.close()


def test_what_is_logged_is_what_is_watched_and_holds_no_text(servers, name):
    server = servers("--log-format", "json", "--log-level", "debug")
    secret = "nobody else may read this"
    with Client(server.target) as service:
        pool = open_pool(service, name)
        answer = pool.apply(ops=[Allocate("r", 10, text=secret), Allocate("s", 9999, text=secret)])
        pool.apply(ops=[Free(answer.results[0].handle, End.FINISHED, 3)])
        with pytest.raises(InvalidError):
            pool.allocate(Allocate("t", 9999, text=secret))
        pool.close_pool()
    assert server.terminate() == 0
    text = server.log.read_text()
    assert secret not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["kind"] for line in lines if "kind" in line] == ["OPENED", "CLOSED"]


def test_the_command_prints_an_event_a_line(server, service, name):
    command = [*ODMA, "watch", name, "--target", server.target]
    command += ["--json", "--count", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        opened: list[PoolClient] = []

        def ended() -> bool:
            # Until it watches, what happens is not for it.
            opened.append(open_pool(service, name, take_over=True))
            return process.poll() is not None

        wait_for(ended, "two events")
        lines = [json.loads(line) for line in process.stdout]
    assert process.returncode == 0
    assert [line["pool"] for line in lines] == [name, name]
    assert {line["kind"] for line in lines} == {"taken_over", "opened"}
