"""What a server finds in its pool directory need not be its own work, nor whole.

It starts, says why it cannot use a file, sets the file aside or leaves it alone, and serves the
other pools. Nothing is removed, and nothing is mended in silence.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from boxes import boxed, insist_on, run_in
from servers import PATIENCE_SECONDS, PLANES, books, open_pool, wait_for

from odma_service._native import Arena
from odma_service.client import Client
from odma_service.errors import (
    BooksLockedError,
    OdmaError,
    PoolLimitError,
    PoolNotFoundError,
    UnavailableError,
)
from odma_service.pool import Pool, PoolSpec
from odma_service.pool.policy import named
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.values import Allocate, Batch, Moves

LAYOUT_VERSION_AT = 8
IN_USE = "another process (or a child it forked) has it open"


@pytest.fixture
def stopped(servers):
    """Return a server that was killed, with the pools "good" and "bad"."""
    server = servers("--log-format", "json")
    with Client(server.target) as service:
        for name in ("good", "bad"):
            open_pool(service, name).apply(ops=[Allocate(f"{name}-{i}", 50) for i in range(9)])
        server.before = books(service, "good")
    server.kill()
    server.log.write_text("")
    server.bad = server.pool_dir / "bad.pool"
    return server


def logged(server):
    """Return what a server has said, an object a line."""
    return [json.loads(line) for line in server.log.read_text().splitlines()]


def told_of(server, event, file):
    """Return the reason that was logged with an event for a file, which must be one."""
    told = [line for line in logged(server) if line["event"] == event]
    [reason] = [line["reason"] for line in told if Path(line["file"]).name == file]
    return reason


def starts_without(server, reason):
    """Start a server that sets "bad" aside for a reason, and serves "good" and all else."""
    server.start()
    aside = server.pool_dir / "bad.pool.set-aside-1"
    assert reason in told_of(server, "pool set aside", aside.name)
    assert reason in aside.with_name(f"{aside.name}.reason").read_text()
    with Client(server.target) as service:
        assert [summary.pool.name for summary in service.list_pools().pools] == ["good"]
        assert books(service, "good") == server.before
        with pytest.raises(PoolNotFoundError):
            service.get_pool("bad")
        assert open_pool(service, "bad").apply(ops=[Allocate("r", 10)]).seq == 1
    return aside


# --- files that are set aside ---


def test_another_layout_version(stopped):
    content = bytearray(stopped.bad.read_bytes())
    content[LAYOUT_VERSION_AT] += 1
    stopped.bad.write_bytes(content)
    aside = starts_without(stopped, "layout version")
    assert aside.read_bytes() == content


def test_an_engines_own_books(stopped):
    """They are whole, but of another geometry and without a word about any pool."""
    stopped.bad.unlink()
    with Arena.attach(stopped.pool_dir / "good.pool") as good:
        geometry = good.geometry._replace(blocks=100)
    Arena.create(stopped.bad, geometry).close()
    starts_without(stopped, "describe no pool")


@pytest.mark.parametrize("left", [0, 10, 4096, 0.5, 0.999])
def test_a_truncated_file(stopped, left):
    size = stopped.bad.stat().st_size
    os.truncate(stopped.bad, left if left >= 1 else int(left * size))
    starts_without(stopped, "it has" if left * size > 4096 and left < 1 else "")


def test_a_file_that_has_grown(stopped):
    with stopped.bad.open("ab") as file:
        file.write(b"more")
    starts_without(stopped, "its geometry needs")


@pytest.mark.parametrize("content", [b"text", b"\0" * 100_000, b"\xff" * 100_000])
def test_what_is_no_arena(stopped, content):
    stopped.bad.write_bytes(content)
    assert starts_without(stopped, "it is").read_bytes() == content


def test_a_file_that_others_may_use(stopped):
    stopped.bad.chmod(0o660)
    starts_without(stopped, "others than its owner may use it (mode 660)")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user(stopped):
    os.chown(stopped.bad, 65534, 65534)
    starts_without(stopped, "it belongs to user 65534")


def test_a_directory_in_the_place_of_a_file(stopped):
    stopped.bad.unlink()
    stopped.bad.mkdir()
    (stopped.bad / "inside").write_text("text")
    aside = starts_without(stopped, "not a regular file")
    assert (aside / "inside").read_text() == "text"


def test_a_symbolic_link_in_the_place_of_a_file(stopped, tmp_path):
    """Not even to books that are whole: whoever made it may exchange them."""
    elsewhere = tmp_path / "elsewhere"
    stopped.bad.rename(elsewhere)
    content = elsewhere.read_bytes()
    stopped.bad.symlink_to(elsewhere)
    aside = starts_without(stopped, "not a regular file")
    assert aside.is_symlink()
    assert elsewhere.read_bytes() == content


def test_a_pipe_in_the_place_of_a_file(stopped):
    stopped.bad.unlink()
    os.mkfifo(stopped.bad, 0o600)
    starts_without(stopped, "not a regular file")


def test_the_second_file_that_is_set_aside_leaves_the_first(stopped):
    stopped.bad.write_bytes(b"text")
    stopped.start()
    stopped.bad.write_bytes(b"text")
    stopped.restart()
    found = sorted(path.name for path in stopped.pool_dir.glob("bad.pool*"))
    assert found == [f"bad.pool.set-aside-{i}{end}" for i in (1, 2) for end in ("", ".reason")]


def test_a_wild_byte_is_found_or_does_not_matter(servers):
    """In each of a dozen pools another byte is changed, the first ones in the header."""
    server, draws = servers("--log-format", "json"), random.Random(1)
    names = [f"p{i}" for i in range(12)]
    with Client(server.target) as service:
        for name in names:
            open_pool(service, name).apply(ops=[Allocate("r", 50)])
        before = {name: books(service, name) for name in names}
        server.kill()
        for i, name in enumerate(names):
            path = server.pool_dir / f"{name}.pool"
            content = bytearray(path.read_bytes())
            place = draws.randrange(64) if i < 4 else draws.randrange(len(content))
            content[place] ^= draws.randrange(1, 256)
            path.write_bytes(content)
        server.start()
        found = {summary.pool.name for summary in service.list_pools().pools}
        for name in found:
            assert books(service, name) == before[name]
    lost = set(names) - found
    assert len(lost) >= 4
    for name in lost:
        assert told_of(server, "pool set aside", f"{name}.pool.set-aside-1")


def test_a_file_that_shrinks_under_its_server(servers):
    server = servers("--log-format", "json")
    with Client(server.target) as service:
        pool = open_pool(service, "p")
        os.truncate(server.pool_dir / "p.pool", 4096)
        with pytest.raises(OdmaError):
            pool.apply(ops=[Allocate("r", 10)])
        assert "its geometry needs" in told_of(server, "pool set aside", "p.pool.set-aside-1")
        assert open_pool(service, "p").apply(ops=[Allocate("r", 10)]).seq == 1


def test_a_symbolic_link_to_nothing(stopped, tmp_path):
    stopped.bad.unlink()
    stopped.bad.symlink_to(tmp_path / "nothing")
    starts_without(stopped, "not a regular file")


def test_the_books_of_another_pool(stopped):
    shutil.copyfile(stopped.pool_dir / "good.pool", stopped.bad)
    starts_without(stopped, "good")


# --- files that are left alone ---


def test_a_file_that_another_process_has_open(stopped):
    with Arena.attach(stopped.bad):
        stopped.start()
        assert IN_USE in told_of(stopped, "pool left alone", "bad.pool")
        with Client(stopped.target, retry_seconds=0) as service:
            assert books(service, "good") == stopped.before
            with pytest.raises(UnavailableError, match="has it open"):
                open_pool(service, "bad", take_over=True)
    with Client(stopped.target) as service:
        assert len(service.list_regions("bad")) == 9  # found as soon as it is given up


FORK = """
import os, signal, sys
from pathlib import Path
from odma_service._native import Arena

arena = Arena.attach(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    signal.pause()
print(child, flush=True)
os._exit(0)
"""


def test_a_forked_child_keeps_a_pool_locked_until_it_ends(stopped):
    command = [sys.executable, "-c", FORK, str(stopped.bad)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        try:
            assert parent.wait(PATIENCE_SECONDS) == 0
            with pytest.raises(BooksLockedError, match="a child it forked"):
                Arena.attach(stopped.bad)
            stopped.start()
            assert IN_USE in told_of(stopped, "pool left alone", "bad.pool")
        finally:
            os.kill(child, signal.SIGKILL)
    with Client(stopped.target) as service:
        wait_for(lambda: is_there(service, "bad"), "finding the pool of a dead child")
        assert len(service.list_regions("bad")) == 9


def is_there(service, name):
    """Say whether a pool can be looked at."""
    try:
        service.get_pool(name)
    except OdmaError:
        return False
    return True


# --- servers in boxes ---


def test_a_server_in_a_pid_namespace_of_its_own_is_locked_out(servers, tmp_path):
    box = ("unshare", "-rpf", "--kill-child")
    insist_on(*box)
    first = servers()
    with Client(first.target) as service:
        open_pool(service, "p").apply(ops=[Allocate("r", 50)])
        refused = run_in(box, "serve", "--listen", "127.0.0.1:0", "--pool-dir", first.pool_dir)
        assert f"belongs to another server, process {first.process.pid}" in refused
        assert len(service.list_regions("p")) == 1
    first.process.kill()
    first.process.wait()
    with boxed(box, first.directory) as other, Client(other.target) as second:
        assert len(second.list_regions("p")) == 1


def fills_up(box, directory):
    """Insist that a server says that there is no room, and has not half a file."""
    with boxed(box, directory) as server, Client(server.target, retry_seconds=0) as service:
        open_pool(service, "small").apply(ops=[Allocate("r", 50)])
        with pytest.raises(PoolLimitError, match="no room"):
            open_pool(service, "large", max_regions=65_536)
        assert [summary.pool.name for summary in service.list_pools().pools] == ["small"]
        with pytest.raises(PoolNotFoundError):
            service.get_pool("large")
        assert open_pool(service, "large", max_regions=16).apply().seq == 1
        assert len(service.list_regions("small")) == 1


def test_a_full_file_system_is_said_when_a_pool_is_opened(tmp_path):
    place = tmp_path / "pools"
    place.mkdir(mode=0o700)
    mount = f'mount -t tmpfs -o size=16m,mode=700 tmpfs {place} && exec "$@"'
    box = ("unshare", "-rm", "sh", "-c", mount, "sh")
    insist_on(*box)
    fills_up(box, tmp_path)


def test_a_limit_of_file_sizes_is_like_a_full_file_system(tmp_path):
    box = ("prlimit", "--fsize=16000000")
    insist_on(*box)
    fills_up(box, tmp_path)


# --- another boot ---


def test_the_epoch_of_another_boot_is_over(stopped):
    stopped.bad.unlink()
    spec = PoolSpec(
        name="bad",
        open_id="mine",
        geometry=pool_geometry(stopped),
        capacity_tokens=4096,
        model_length_tokens=4096,
        moves=Moves.ANY,
    )
    with Pool.create(stopped.bad, spec, 5, "another boot", named("elastic", 4096, 4096)) as pool:
        pool.apply(5, Batch(1, 0, [], [Allocate("r", 50)]))
    stopped.start()
    assert "machine was started anew" in stopped.log.read_text()
    with Client(stopped.target) as service:
        assert books(service, "good") == stopped.before
        assert service.get_pool("bad").summary.state == pool_pb.POOL_STATE_CLOSED
        assert service.list_regions("bad") == []
        assert open_pool(service, "bad").ref.epoch > 5


def pool_geometry(server):
    """Return the geometry of the pools of the tests, as the domain has it."""
    with Arena.attach(server.pool_dir / "good.pool") as arena:
        spec = PoolSpec.from_json(arena.description())
    assert spec.geometry.plane_count == sum(group.count for group in PLANES)
    return spec.geometry
