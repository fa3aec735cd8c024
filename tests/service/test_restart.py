"""What survives the server: pools, epochs, answers and regions, through kill -9 and SIGTERM."""

from __future__ import annotations

import signal
import socket
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from running import fail_to_serve, odma
from servers import books, open_pool, places_of, wait_for

from odma_service.client import Client, chained_keys
from odma_service.errors import EpochError, PoolOwnedError, SeqChangedError, UnavailableError
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1.pool_service_pb2_grpc import PoolServiceStub
from odma_service.service.server import NOTICE_SECONDS
from odma_service.values import (
    Allocate,
    Batch,
    End,
    Extend,
    Free,
    Place,
    PolicyChange,
    Refusal,
    Trim,
    Used,
)
from odma_service.wire import batch_to


@pytest.fixture
def restarted(servers):
    """Return a server of its own for the test."""
    return servers()


@pytest.fixture
def service(restarted):
    with Client(restarted.target) as client:
        yield client


def test_everything_is_found_again_after_a_kill(restarted, service):
    pool = open_pool(service, "p", policy=PolicyChange(name="odma"))
    answer = pool.apply(
        ops=[Allocate(f"r{i}", 100, request_class="chat", max_total_tokens=500) for i in range(5)]
    )
    handles = [place.handle for place in answer.results]
    pool.apply(
        used=[Used(handle, 60) for handle in handles],
        ops=[Free(handles[1], End.FINISHED, 60), Trim(handles[0], 200), Extend(handles[2], 500)],
    )
    before = books(service, "p")
    restarted.restart()
    assert books(service, "p") == before


def test_what_is_kept_is_found_again_after_a_kill(restarted, service):
    pool = open_pool(service, "p", granule_tokens=64)
    keys = chained_keys(range(256), 64, b"")
    runs, ended = (
        place.handle
        for place in pool.apply(
            ops=[Allocate("runs", 200, keys=keys[:48]), Allocate("ended", 300, keys=keys)]
        ).results
    )
    pool.apply(
        [Used(runs, 200, shareable_tokens=130), Used(ended, 300)],
        [Free(ended, End.FINISHED, 1, keep_tokens=260)],
    )
    restarted.restart()
    answer = pool.apply(
        [Used(runs, 200)],
        [Allocate("again", 300, keys=keys), Allocate("half", 140, keys=keys[:32])],
    )
    assert [place.reused_tokens for place in answer.results] == [256, 128]
    restarted.restart()
    pool.reconcile([runs], completed_seq=pool.seq)
    assert pool.allocate(Allocate("half", 140, keys=keys[:32])).reused_tokens == 0
    assert pool.apply([], [Allocate("more", 140, keys=keys[:32])]).results[0].reused_tokens == 128


def test_an_engine_goes_on_as_if_nothing_had_happened(restarted, service):
    pool = open_pool(service, "p")
    for round_number in range(5):
        answer = pool.apply(ops=[Allocate(f"r{round_number}", 100)])
        assert answer.seq == round_number + 1
        restarted.restart()
    assert len(service.list_regions("p")) == 5


def test_the_answer_to_the_last_batch_is_kept(restarted, service):
    pool = open_pool(service, "p")
    first = pool.apply(ops=[Allocate("a", 100), Allocate("b", 100)])
    handle = first.results[0].handle
    ops = [Extend(handle, 500), Allocate("c", 4000), Allocate("d", 0)]
    request = batch_to(pool.numbered(), Batch(2, 1, [Used(handle, 90)], ops))
    answer = service.call(service.memory.Apply, request)
    assert answer.copies
    restarted.restart()
    again = service.call(service.memory.Apply, request)
    assert again.replayed
    again.replayed = False
    assert again == answer
    request.ops[0].extend.least_tokens += 1
    with pytest.raises(SeqChangedError):
        service.call(service.memory.Apply, request)


def test_the_same_open_id_gets_its_epoch_after_a_restart(restarted, service):
    first = open_pool(service, "p", open_id="mine")
    place = first.allocate(Allocate("r", 10))
    restarted.restart()
    again = open_pool(service, "p", open_id="mine")
    assert again.ref.epoch == first.ref.epoch
    assert list(again.reconcile([place.handle]).kept) == [place]
    with pytest.raises(PoolOwnedError):
        open_pool(service, "p", open_id="another")


def test_a_pool_can_be_taken_over_after_a_restart(restarted, service):
    old = open_pool(service, "p")
    old.allocate(Allocate("r", 10))
    restarted.restart()
    new = open_pool(service, "p", take_over=True)
    assert new.ref.epoch > old.ref.epoch
    assert service.list_regions("p") == []
    with pytest.raises(EpochError):
        old.allocate(Allocate("r", 10))


def test_a_closed_pool_stays_closed_and_remembers(restarted, service):
    pool = open_pool(service, "p")
    pool.set_policy(PolicyChange(name="static"))
    pool.close_pool()
    restarted.restart()
    facts = service.get_pool("p")
    assert facts.summary.state == pool_pb.POOL_STATE_CLOSED
    assert facts.policy.name == "static"
    pool.close_pool()
    assert open_pool(service, "p").ref.epoch > pool.ref.epoch


def test_several_pools_are_kept_apart(restarted, service):
    pools = {name: open_pool(service, name, block_tokens=size) for name, size in SIZES.items()}
    for name, pool in pools.items():
        pool.apply(ops=[Allocate(f"{name}{i}", 100) for i in range(SIZES[name] // 16)])
    before = {name: books(service, name) for name in pools}
    restarted.restart()
    assert {name: books(service, name) for name in pools} == before
    pools["a"].close_pool()
    assert books(service, "b") == before["b"]


SIZES = {"a": 16, "b": 32, "c": 64}


def test_broken_books_do_not_keep_the_others_from_being_found(restarted, service):
    open_pool(service, "good").allocate(Allocate("r", 10))
    open_pool(service, "bad")
    before = books(service, "good")
    restarted.kill()
    (restarted.pool_dir / "bad.pool").write_bytes(b"\0" * 4096)
    restarted.start()
    assert [summary.pool.name for summary in service.list_pools().pools] == ["good"]
    assert books(service, "good") == before
    assert "set aside" in restarted.log.read_text()
    open_pool(service, "bad")


STEPS = 60


def play(pool, passed):
    """Play an engine's steps; return where its regions lie as it believes."""
    places = {}
    for step in range(STEPS):
        request = f"r{step}"
        victims = list(places.values())[: len(places) // 8]
        answer = pool.apply(
            used=[Used(place.handle, 20) for place in places.values()],
            ops=[Free(victim.handle, End.FINISHED, 9) for victim in victims]
            + [Allocate(request, 20, max_total_tokens=200)],
            completed_seq=pool.seq,
        )
        gone = {victim.handle for victim in victims}
        places = {r: p for r, p in places.items() if p.handle not in gone}
        moved = {place.handle: place for place in answer.moved}
        places = {r: moved.get(p.handle, p) for r, p in places.items()}
        if isinstance(answer.results[-1], Place):
            places[request] = answer.results[-1]
        passed.release()
    return places


def test_engines_lose_no_step_while_the_server_dies_is_upgraded_and_dies_again(restarted):
    """Four engines, two of them by streams; their books agree in the end."""
    target = restarted.target
    passed = threading.Semaphore(0)

    def engine(name):
        with Client(target, timeout_seconds=5, retry_seconds=60) as service:
            pool = open_pool(service, name)
            with pool.stream() if name in "ab" else nullcontext():
                places = play(pool, passed)
            assert pool.seq == service.get_pool(name).last_seq == STEPS
            return places_of(service, name) == places

    with ThreadPoolExecutor(4) as engines:
        results = [engines.submit(engine, name) for name in "abcd"]
        for end in (restarted.kill, restarted.terminate, restarted.kill):
            for _ in range(STEPS):
                assert passed.acquire(timeout=60)
            end()
            restarted.start()
        assert all(result.result() for result in results)


# --- an orderly end ---


def test_a_terminated_server_ends_with_0_and_says_so(restarted, service):
    pool = open_pool(service, "p")
    pool.allocate(Allocate("r", 10))
    before = books(service, "p")
    assert restarted.terminate() == 0
    assert "draining" in restarted.log.read_text()
    restarted.start()
    assert books(service, "p") == before


@contextmanager
def call_under_way(target):
    """Keep a call under way: its message does not come while the context lasts."""
    stop = threading.Event()

    def never():
        stop.wait()
        yield from ()

    with grpc.insecure_channel(target) as channel:
        call = channel.stream_unary("/odma.v1.MemoryService/Apply")
        hung = call.future(never())
        # A call that comes later is taken later.
        PoolServiceStub(channel).ListPools(pool_pb.ListPoolsRequest())
        try:
            yield
        finally:
            hung.cancel()
            stop.set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_watchers_of_its_health_see_it_go_and_it_is_alive_to_the_end(servers, number):
    server = servers("--drain-seconds", "60")
    alive = health_pb2.HealthCheckRequest(service="odma.alive")
    status = health_pb2.HealthCheckResponse
    with grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == status.SERVING
        with call_under_way(server.target):
            server.process.send_signal(number)
            assert next(watch).status == status.NOT_SERVING
            asked = time.monotonic()
            while time.monotonic() < asked + 4 * NOTICE_SECONDS:
                assert health.Check(alive).status == status.SERVING
            with Client(server.target, retry_seconds=0) as late:
                assert not late.is_serving()
                with pytest.raises(UnavailableError, match="draining"):
                    late.get_pool("p")
        server.process.communicate(timeout=30)  # no watcher keeps it for all its drain time
        assert server.process.returncode == 0


def test_a_second_signal_ends_it_at_once(servers):
    server = servers("--drain-seconds", "60")
    with call_under_way(server.target):
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "draining" in server.log.read_text(), "draining")
        server.process.send_signal(signal.SIGTERM)
        server.process.communicate(timeout=30)
    assert server.process.returncode == -signal.SIGTERM


def test_calls_under_way_are_answered_before_it_ends(restarted):
    """Every batch that a draining server took was done, and no other."""
    with Client(restarted.target, retry_seconds=0.5) as service:
        pools = [open_pool(service, name) for name in "abcd"]

    def work(pool):
        with Client(restarted.target, retry_seconds=0) as service:
            pool._client = service
            try:
                while True:
                    pool.apply()
            except UnavailableError as error:
                return error

    with ThreadPoolExecutor(4) as engines:
        results = [engines.submit(work, pool) for pool in pools]
        wait_for(lambda: all(pool.seq > 10 for pool in pools), "work")
        assert restarted.terminate() == 0
        for result in results:
            assert type(result.result()) is UnavailableError
    restarted.start()
    with Client(restarted.target) as service:
        for pool in pools:
            assert service.get_pool(pool.ref.name).last_seq == pool.seq


REGIONS, DRAIN_SECONDS = 65_536, 2.0


@pytest.mark.timeout(300)
def test_a_drain_ends_in_time_while_a_pool_plans_as_long_as_it_may(servers):
    """The largest table, full of holes; each batch asks in vain until its search is cut."""
    server = servers("--drain-seconds", str(DRAIN_SECONDS))
    with Client(server.target, timeout_seconds=100) as service:
        pool = open_pool(
            service,
            "p",
            capacity_tokens=16 * REGIONS,
            max_regions=REGIONS,
            policy=PolicyChange(name="elastic", step_tokens=1, safety_share=0.0),
        )
        handles = []
        for first in range(0, REGIONS, 1024):
            ops = [Allocate(f"r{first + i}", 15) for i in range(1024)]
            handles += [place.handle for place in pool.apply(ops=ops).results]
        for first in range(1, REGIONS, 2048):
            pool.apply(ops=[Free(one, End.ABORTED) for one in handles[first : first + 2048 : 2]])
    kept = handles[::2]
    used = [Used(handle, 16, pinned=True) for handle in kept]
    ops = [Extend(handle, 40 * 16) for handle in kept[:1024]]
    answered = []

    def work():
        with Client(server.target, timeout_seconds=100, retry_seconds=0) as service:
            pool._client = service
            try:
                while True:
                    begun = time.monotonic()
                    results = pool.apply(ops=ops, used=used, pass_refused=True).results
                    assert all(isinstance(result, Refusal) for result in results)
                    answered.append(time.monotonic() - begun)
            except UnavailableError as error:
                return error

    with ThreadPoolExecutor(1) as engine:
        ended = engine.submit(work)
        wait_for(lambda: answered, "a batch", 100)
        begun = time.monotonic()
        assert server.terminate() == 0
        seconds = time.monotonic() - begun
        assert type(ended.result()) is UnavailableError
    assert seconds < DRAIN_SECONDS + 1, answered


# --- where it listens ---


def test_a_unix_socket_is_for_its_user_alone(servers, tmp_path):
    path = tmp_path / "odma.sock"
    server = servers(listen=f"unix:{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with Client(server.target) as service:
        open_pool(service, "p").apply()
        server.restart()  # over the socket file that the dead one left
        assert service.get_pool("p").last_seq == 1
        assert server.terminate() == 0
    assert not path.exists()


def test_several_addresses_are_served_at_once(servers, tmp_path):
    path = tmp_path / "odma.sock"
    server = servers("--listen", f"unix:{path}")
    first, second = server.listen.split(", ")
    assert second == f"unix:{path}"
    with Client(first) as one, Client(second) as other:
        open_pool(one, "p")
        assert [pool.pool.name for pool in other.list_pools().pools] == ["p"]


def test_a_port_in_use_is_an_error(restarted, tmp_path):
    complaint = fail_to_serve("--listen", restarted.target, "--pool-dir", tmp_path / "other")
    assert f"odma serve: cannot listen on {restarted.target}: Address already in use" in complaint


def test_a_socket_in_use_is_an_error(servers, tmp_path):
    path = tmp_path / "odma.sock"
    server = servers(listen=f"unix:{path}")
    complaint = fail_to_serve("--listen", f"unix:{path}", "--pool-dir", tmp_path / "other")
    assert "another server does" in complaint
    with Client(server.target) as service:
        assert service.is_serving()


def test_a_file_in_the_place_of_the_socket_is_not_removed(tmp_path):
    path = tmp_path / "precious"
    path.write_text("text")
    complaint = fail_to_serve("--listen", f"unix:{path}", "--pool-dir", tmp_path / "pools")
    assert "no socket" in complaint
    assert path.read_text() == "text"


def test_a_pool_directory_that_others_may_write_to_is_an_error(tmp_path):
    (tmp_path / "pools").mkdir(mode=0o700)
    (tmp_path / "pools").chmod(0o777)
    complaint = fail_to_serve("--listen", "127.0.0.1:0", "--pool-dir", tmp_path / "pools")
    assert "writable for nobody else" in complaint


def test_the_pool_directory_is_made_for_its_user_alone(restarted):
    assert stat.S_IMODE(restarted.pool_dir.stat().st_mode) == 0o700


def test_listening_beyond_this_machine_is_warned_of(servers):
    server = servers("--log-format", "json", "--allow-insecure", listen="0.0.0.0:0")
    assert '"level": "warning"' in server.log.read_text()
    with Client(f"127.0.0.1:{server.listen.rpartition(':')[2]}") as service:
        assert service.is_serving()


def test_health_as_a_command_is_an_exit_code(restarted):
    def health(*arguments):
        return odma("health", *arguments).returncode

    assert health("--target", restarted.target) == 0
    predictor = ("--service", "odma.v1.PredictorService")
    assert health("--target", restarted.target, *predictor) == 0
    assert health("--target", restarted.target, "--service", "odma.v1.NoService") == 1
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    assert health("--target", f"127.0.0.1:{port}") == 1


def test_the_health_command_imports_nothing_of_the_service(restarted):
    run = odma("health", "--target", restarted.target, environment={"PYTHONPROFILEIMPORTTIME": "1"})
    assert run.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "odma_service.client" in imported
    assert not imported & {
        "numpy",
        "onnxruntime",
        "odma_service.cli.serve",
        "odma_service.service.server",
        "rich",
    }
