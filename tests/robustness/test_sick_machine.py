"""A machine that is ill: full, read-only, out of descriptors, blocked, stopped, set back in time.

One pool or one call is refused for a while. Nothing sound is given up, and everything goes on when
the trouble is over.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest
from boxes import boxed, insist_on
from google.rpc import error_details_pb2 as details_pb
from grpc_status import rpc_status
from registries import Clock, open_in, registry_of, state
from running import fail_to_serve
from servers import PLAIN, open_pool, wait_for
from watching import kinds

from odma_service._native import Arena, ArenaGeometry
from odma_service.client import Client
from odma_service.client.local import ODMA, READY
from odma_service.errors import (
    BooksSpaceError,
    OdmaError,
    PoolLimitError,
    PoolOwnedError,
    UnavailableError,
)
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import memory_service_pb2_grpc, pool_service_pb2
from odma_service.rpc.v1.pool_service_pb2_grpc import PoolServiceStub
from odma_service.service.door.private import Reloaded, read_file
from odma_service.service.pools.directory import LOCK_NAME, PoolDirectory
from odma_service.service.watch.decisions import REQUEST_START, ROTATED, RotatedFile
from odma_service.service.watch.events import EventKind
from odma_service.service.watch.lines import Lines, Seldom
from odma_service.values import Allocate, PolicyChange

PUNCH_HOLE = 0x03  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
RECORDS_AT = 4096


def insist_unavailable(call):
    """Insist that a call is refused for a while, with when to ask again."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    details = rpc_status.from_call(caught.value).details
    info, retry = details_pb.ErrorInfo(), details_pb.RetryInfo()
    assert any(detail.Unpack(info) for detail in details)
    assert info.reason == "BOOKS_UNAVAILABLE"
    assert any(detail.Unpack(retry) for detail in details)


def keep_alive(target, pool):
    """Return a call of a pool's owner that is made once, without retries."""

    def call():
        with grpc.insecure_channel(target) as channel:
            stub = memory_service_pb2_grpc.MemoryServiceStub(channel)
            return stub.KeepAlive(pb.KeepAliveRequest(pool=pool), timeout=30)

    return call


def apply_once(target, pool):
    """Return a first batch that is sent once, without retries."""

    def call():
        with grpc.insecure_channel(target) as channel:
            stub = memory_service_pb2_grpc.MemoryServiceStub(channel)
            request = pb.ApplyRequest(pool=pool, seq=1)
            request.pool.number = 1
            allocate = request.ops.add().allocate
            allocate.request_id, allocate.prompt_tokens = "r", 50
            return stub.Apply(request, timeout=30)

    return call


# --- a page that fails ---


def full_tmpfs(place, before):
    """Return a program that mounts a tmpfs on `place`, runs a script there, then what is given."""
    mount = f"mount -t tmpfs -o size=24m,mode=700 tmpfs {place} && cd {place} && {before}"
    return ("unshare", "-rm", "sh", "-c", mount + ' && cd / && exec "$@"', "sh")


def fill(place):
    """Take all that is left of a file system."""
    with (place / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(65536))


@pytest.fixture
def pool_files(servers, tmp_path):
    """Return a directory with the files of the pools "good" and "bad", each with a region."""
    server = servers(name="before")
    with Client(server.target) as service:
        refs = {}
        for name in ("good", "bad"):
            pool = open_pool(service, name)
            pool.apply(ops=[Allocate("r", 50)])
            refs[name] = pool.ref
    server.kill()
    return server.pool_dir, refs


def test_a_sparse_copy_on_a_full_file_system_harms_its_own_pool_only(pool_files, tmp_path):
    files, refs = pool_files
    place = tmp_path / "pools"
    place.mkdir(mode=0o700)
    box = full_tmpfs(
        place,
        f"cp {files}/good.pool . && cp --sparse=always {files}/bad.pool . "
        "&& { dd if=/dev/zero of=filler bs=64k 2>/dev/null || true; }",
    )
    insist_on(*box[:2])
    with boxed(box, tmp_path) as server, Client(server.target, retry_seconds=0) as service:
        assert len(service.list_regions("good")) == 1
        insist_unavailable(keep_alive(server.target, refs["bad"]))
        (Path(f"/proc/{server.process.pid}/root{place}") / "filler").unlink()
        assert len(service.list_regions("bad")) == 1
        keep_alive(server.target, refs["bad"])()
        assert len(service.list_regions("good")) == 1


def test_a_page_that_fails_in_a_call_breaks_one_arena_and_not_the_service(tmp_path):
    place = tmp_path / "pools"
    place.mkdir(mode=0o700)
    box = full_tmpfs(place, "true")
    insist_on(*box[:2])
    with boxed(box, tmp_path) as server, Client(server.target, retry_seconds=0) as service:
        good, bad = open_pool(service, "good"), open_pool(service, "bad")
        good.apply(ops=[Allocate("r", 50)])
        inside = Path(f"/proc/{server.process.pid}/root{place}")
        with (inside / "bad.pool").open("r+b") as file:  # as after a snapshot: a page of no block
            size = os.fstat(file.fileno()).st_size
            libc = ctypes.CDLL(None, use_errno=True)
            hole = map(ctypes.c_long, (RECORDS_AT, size // 2))
            assert libc.fallocate(file.fileno(), PUNCH_HOLE, *hole) == 0
        fill(inside)
        insist_unavailable(apply_once(server.target, bad.ref))
        assert good.apply(ops=[Allocate("s", 50)]).seq == 2
        (inside / "filler").unlink()
        assert good.apply(ops=[Allocate("t", 50)]).seq == 3
        assert bad.apply(ops=[Allocate("r", 50)]).seq == 1
        assert server.terminate() == 0


def test_a_library_owns_no_signal():
    code = (
        "import signal, odma_service._native as n; a = signal.getsignal(signal.SIGBUS);"
        "print(a == signal.SIG_DFL)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "True\n"


# --- the system refuses ---


@contextmanager
def no_descriptor():
    """Let no file be opened in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_server_without_descriptors_refuses_for_a_while_and_goes_on(servers):
    server = servers()
    with Client(server.target, retry_seconds=0) as service:
        good = open_pool(service, "good")
        good.apply(ops=[Allocate("r", 50)])
        before = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        used = {int(fd.name) for fd in Path(f"/proc/{server.process.pid}/fd").iterdir()}
        lowest = min(set(range(max(used) + 2)) - used)
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (lowest, before[1]))
        with pytest.raises(UnavailableError, match="cannot make"):
            open_pool(service, "new")
        assert good.apply(ops=[Allocate("s", 50)]).seq == 2
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, before)
        assert open_pool(service, "new").apply().seq == 1
    assert not list(server.pool_dir.glob("*.set-aside*"))


def test_files_that_could_not_be_read_are_read_when_they_can_be(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o600)
    value = Reloaded([path], lambda: read_file(path, private=True))
    path.write_text("newer")
    with no_descriptor():
        assert value.get() == b"old"
    wait_for(lambda: value.get() == b"newer", "the new content")


def test_what_an_attempt_left_behind_does_not_block_the_next(registry, tmp_path):
    first = open_in(registry, "p", open_id="a").epoch
    registry.close_epoch("p", first)
    (tmp_path / "p.pool.new").write_bytes(b"left by a rename that failed")
    assert open_in(registry, "p", open_id="b", block_tokens=32).epoch > first


def test_all_pools_together_have_a_bound_in_bytes(servers):
    server = servers("--max-pool-bytes", "12000000")
    with Client(server.target) as service:
        first = open_pool(service, "first")
        with pytest.raises(PoolLimitError, match=r"takes 6,103,040 bytes.*of 12,000,000"):
            open_pool(service, "second")
        assert open_pool(service, "small", max_regions=64).apply().seq == 1
        assert first.apply().seq == 1


# --- the log ---


@contextmanager
def server_with_stderr(directory, stderr, *flags):
    """Run a server with its own stderr; yield the process and its address."""
    command = [*ODMA, "serve", "--listen", "127.0.0.1:0", "--pool-dir", str(directory), *flags]
    if stderr is None:
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=PLAIN)
    try:
        line = process.stdout.readline()
        assert line.startswith(READY)
        yield process, line.removeprefix(READY).strip()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def full_pipe():
    """Return the end of a pipe that takes no byte more, and that nobody reads."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"\0")
    os.set_blocking(writing, True)
    yield writing
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("kind", ["full pipe", "full disk", "closed"])
def test_a_log_that_takes_no_line_stops_nothing(tmp_path, full_pipe, kind):
    stderr = {
        "full pipe": full_pipe,
        "full disk": os.open("/dev/full", os.O_WRONLY),
        "closed": None,
    }
    with server_with_stderr(tmp_path / "pools", stderr[kind]) as (process, target):
        with Client(target, retry_seconds=0) as service, watched(target) as told:
            pool = open_pool(service, "p")
            pool.set_policy(PolicyChange(name="static"))
            for number in range(1100):  # more than are queued
                pool.set_policy(PolicyChange(safety_share=number / 11_000))
            silent = open_pool(service, "silent", ttl_seconds=1, retention_seconds=1)
            assert {"OPENED", "POLICY_SET", "EXPIRED"} <= set(kinds_up_to("EXPIRED", told))
            again = open_pool(service, "silent", open_id="again")
            assert again.ref.epoch > silent.ref.epoch
        process.terminate()
        process.wait(30)
        assert process.returncode == 0


@contextmanager
def watched(target):
    """Watch all events of a server from now on."""
    with grpc.insecure_channel(target) as channel:
        answers = PoolServiceStub(channel).Watch(pool_service_pb2.WatchRequest(), timeout=60)
        next(answers)
        yield answers


def kinds_up_to(last, answers):
    """Return the kinds of the events up to the first of the kind `last`."""
    told = []
    while last not in told:
        told += kinds([next(answers)])
    return told


def test_lost_lines_are_counted_and_told_once_there_is_room():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    lines = Lines(writing, most=3)
    for i in range(10):
        lines.write(f"line {i}\n")
    assert 6 <= lines.lost <= 7  # one may be on its way
    lost = lines.lost
    os.set_blocking(reading, False)
    text = b""

    def arrived():
        nonlocal text
        with suppress(BlockingIOError):
            text += os.read(reading, 1 << 20)
        return b"line 2" in text

    wait_for(arrived, "the lines that were kept")
    assert f"{lost} lines of the log were lost".encode() in text
    lines.close()
    os.close(reading)
    os.close(writing)


def test_refused_callers_are_logged_seldom(servers, tmp_path):
    tokens = tmp_path / "tokens.toml"
    tokens.touch(mode=0o600)
    tokens.write_text('[[identity]]\nname = "a"\nrole = "engine"\ntoken = "0123456789abcdef0123"\n')
    server = servers("--token-file", str(tokens), "--log-format", "json")
    with Client(server.target, retry_seconds=0) as service:
        for _ in range(200):
            with pytest.raises(OdmaError):
                service.list_pools()
    lines = server.log.read_text().splitlines()
    assert 1 <= sum("caller refused" in line for line in lines) < 100


def test_a_line_that_was_let_through_says_how_many_were_not():
    clock = Clock()
    seldom = Seldom(2, 10, clock)
    assert [seldom.let() for _ in range(5)] == [0, 0, None, None, None]
    clock.now += 10
    assert seldom.let() == 3


# --- the decision log ---


def test_a_rotation_that_fails_loses_no_older_log(tmp_path):
    path = tmp_path / "log"
    names = [path, *(Path(f"{path}.{i + 1}") for i in range(ROTATED))]
    for i, name in enumerate(names):
        name.write_text(f"{REQUEST_START}{i}\n")
    before = {name: name.read_text() for name in names}
    log = RotatedFile(path, 10)
    with no_descriptor():
        for _ in range(10):
            with pytest.raises(OSError, match="Too many open files"):
                log.write(["a line of the log\n"])
    assert {name: name.read_text() for name in names} == before
    log.write(["a line of the log\n"])
    assert path.read_text() == "a line of the log\n"
    assert names[1].read_text() == before[path]
    log.close()


def test_a_rotation_that_cannot_rename_loses_nothing_however_often_it_is_tried(tmp_path):
    path = tmp_path / "log"
    names = [path, *(Path(f"{path}.{i + 1}") for i in range(ROTATED))]
    for i, name in enumerate(names[:-1]):
        name.write_text(f"{REQUEST_START}{i}\n")
    (names[-1] / "not empty").mkdir(parents=True)  # takes no file in its place
    log = RotatedFile(path, 10)
    for _ in range(10):
        with pytest.raises(OSError):  # noqa: PT011 - which one is up to the system
            log.write(["a line of the log\n"])
    assert [name.read_text() for name in names[:-1]] == [
        f"{REQUEST_START}{i}\n" for i in range(ROTATED)
    ]
    log.close()


# --- time ---


def test_a_server_that_was_stopped_takes_nobody_for_silent(servers):
    server = servers()
    with Client(server.target) as service:
        pool = open_pool(service, "p", ttl_seconds=1, retention_seconds=2)
        server.process.send_signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        wait_for(lambda: time.monotonic() > stopped_at + 4, "more than the retention time")
        server.process.send_signal(signal.SIGCONT)
        service.list_pools()  # a look closes nothing either
        pool.keep_alive()
        assert service.get_pool("p").summary.state == pool_service_pb2.POOL_STATE_OPEN
    assert "its owner is silent" not in server.log.read_text()


def test_what_the_reaper_missed_is_nobodys_silence(registry, clock):
    epoch = open_in(registry, "p", ttl_seconds=5, retention_seconds=10).epoch
    clock.now += 4
    registry.reap()
    clock.now += 100
    registry.reap(missed_seconds=99.5)
    assert state(registry, "p") == (epoch, 4.5)
    clock.now += 6
    registry.reap()
    assert state(registry, "p")[0] == 0


def test_a_late_call_is_heard_before_the_clock_is_looked_at(registry, clock):
    epoch = open_in(registry, "p", ttl_seconds=5, retention_seconds=10).epoch
    clock.now += 1000
    with registry.owned("p", epoch):
        pass
    registry.reap()
    assert state(registry, "p") == (epoch, 0)


@pytest.mark.parametrize("year_1970", [0.0, -500.0])
def test_epochs_grow_though_books_are_lost_and_the_clock_is_set_back(tmp_path, year_1970):
    clock = Clock()
    epochs = []
    for now in (2_000_000_000.0, year_1970, year_1970, 1_000_000.0):
        clock.now = now
        directory = PoolDirectory.take(tmp_path)
        registry = registry_of(
            tmp_path, clock, last_epoch=directory.last_epoch, keep_epoch=directory.keep_epoch
        )
        epochs.append(open_in(registry, "p").epoch)
        registry.close()
        directory.close()
        (tmp_path / "p.pool").unlink()
    assert epochs == sorted(set(epochs))


# --- what failed leaves no trace ---


@contextmanager
def no_room():
    """Let files of this process have a megabyte at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_open_that_fails_forgets_no_pool(registry, tmp_path):
    for name in "abc":  # as many as the registry takes
        registry.close_epoch(name, open_in(registry, name).epoch)
    with no_room(), pytest.raises(BooksSpaceError) as raised:
        open_in(registry, "d")
    assert str(tmp_path) not in str(raised.value)
    told = registry.telemetry.events.after(0).events[-1]
    assert told.kind == EventKind.NO_ROOM
    assert str(tmp_path) in told.reason
    assert sorted(registry.names()) == ["a", "b", "c"]
    assert (tmp_path / "a.pool").exists()
    assert registry.telemetry.events.counts()[EventKind.FORGOTTEN] == 0
    open_in(registry, "d")
    assert sorted(registry.names()) == ["b", "c", "d"]


def test_a_take_over_that_fails_is_not_told(registry):
    epoch = open_in(registry, "p", open_id="old").epoch
    with pytest.raises(PoolOwnedError):
        open_in(registry, "p", open_id="new")
    with no_room(), pytest.raises(PoolLimitError):
        open_in(registry, "p", take_over=True, open_id="new", block_tokens=32)
    assert registry.telemetry.events.counts()[EventKind.TAKEN_OVER] == 0
    assert state(registry, "p")[0] == epoch
    assert open_in(registry, "p", take_over=True, open_id="new", block_tokens=32).epoch > epoch
    assert registry.telemetry.events.counts()[EventKind.TAKEN_OVER] == 1


# --- two servers ---


def test_a_second_server_is_refused_and_told_who_has_the_directory(servers):
    server = servers()
    complaint = fail_to_serve("--listen", "127.0.0.1:0", "--pool-dir", server.pool_dir)
    assert f"belongs to another server, process {server.process.pid}" in complaint
    assert "--wait-for-pool-dir" in complaint
    with Client(server.target) as service:
        assert open_pool(service, "p").apply().seq == 1


@pytest.fixture
def waiting(servers):
    """Return a server, and a second one that waits for its directory."""
    server = servers()
    with Client(server.target) as service:
        open_pool(service, "p").apply(ops=[Allocate("r", 50)])
    command = ["serve", "--listen", "127.0.0.1:0", "--pool-dir", str(server.pool_dir)]
    second = subprocess.Popen(
        [*ODMA, *command, "--wait-for-pool-dir"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=PLAIN,
    )
    wait_for(lambda: "waits" in second.stderr.readline(), "the line that it waits")
    yield server, second
    second.kill()
    second.communicate()


def test_a_server_that_waits_takes_over_when_the_first_is_gone(waiting):
    server, second = waiting
    server.process.kill()
    line = second.stdout.readline()
    assert line.startswith(READY)
    with Client(line.removeprefix(READY).strip()) as service:
        assert len(service.list_regions("p")) == 1


def test_a_server_that_waits_can_be_stopped(waiting):
    server, second = waiting
    second.terminate()
    assert second.wait(30) == 0
    assert server.process.poll() is None


def test_a_lock_file_that_was_removed_locks_nobody_in(tmp_path):
    first = PoolDirectory.take(tmp_path)
    (tmp_path / LOCK_NAME).unlink()
    second = PoolDirectory.take(tmp_path)  # another file, so another lock
    assert second.last_epoch == 0
    first.close()
    second.close()


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_that_asks_for_nothing_leaves_a_line(servers, number):
    server = servers("--log-format", "json")
    server.process.send_signal(number)
    wait_for(lambda: number.name in server.log.read_text(), "the line in the log")
    with Client(server.target) as service:
        assert open_pool(service, "p").apply().seq == 1
    assert server.terminate() == 0


# --- forks ---

GEOMETRY = ArenaGeometry(
    blocks=64,
    block_tokens=16,
    max_regions=16,
    max_ops=16,
    max_copies=16,
    model_length_tokens=1024,
    digest=1,
)


def test_a_child_that_closes_an_arena_gives_back_only_what_it_has(tmp_path):
    arena = Arena.create(tmp_path / "a.pool", GEOMETRY)
    [at] = re.findall(
        rf"^(\w+)-(\w+) .*{tmp_path}/a.pool$", Path("/proc/self/maps").read_text(), re.MULTILINE
    )
    start, end = (int(text, 16) for text in at)
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    fixed_noreplace = 0x100000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed_noreplace
    child = os.fork()
    if child == 0:
        own = libc.mmap(start, end - start, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if own != start:
            os._exit(2)
        ctypes.memset(own, 7, end - start)
        arena.close()
        os._exit(0 if ctypes.string_at(own, 1) == b"\7" else 1)
    assert os.waitpid(child, 0)[1] == 0
    arena.check()  # the parent still has all of it
    arena.close()


def test_a_child_does_not_close_a_file_of_its_own(tmp_path):
    arena = Arena.create(tmp_path / "a.pool", GEOMETRY)
    child = os.fork()
    if child == 0:
        os.closerange(3, 256)
        own = [os.open("/dev/null", os.O_RDONLY) for _ in range(64)]
        arena.close()
        for descriptor in own:
            os.fstat(descriptor)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    arena.close()
