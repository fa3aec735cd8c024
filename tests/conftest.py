"""A real server for the tests that talk to one, and the books to compare before and after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer

import pytest

from odma_service.client import Client, PoolClient
from odma_service.rpc.v1 import types_pb2 as types

READY = "odma ready on "
PATIENCE_SECONDS = 30
GEOMETRY = types.Geometry(planes=[types.PlaneGroup(count=2, bytes_per_token=64)])
CAPACITY_TOKENS = 4096


@dataclass
class Server:
    """`odma serve` as a process. Its pools outlive it."""

    pool_dir: Path
    flags: tuple[str, ...] = ()
    listen: str = "127.0.0.1:0"
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> Server:
        """Start the process, on the address it had before if it had one, and wait for it."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("ODMA_")}
        command = [sys.executable, "-m", "odma_service", "serve", "--listen", self.listen]
        command += ["--pool-dir", str(self.pool_dir), "--metrics-listen", "", *self.flags]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=ours | self.environment,
            )
        deadline = Timer(PATIENCE_SECONDS, self.process.kill)
        deadline.start()
        line = self.process.stdout.readline()
        deadline.cancel()
        assert line.startswith(READY), self.log.read_text()
        self.listen = line.removeprefix(READY).strip()
        return self

    @property
    def log(self) -> Path:
        return self.pool_dir.with_suffix(".log")

    @property
    def target(self) -> str:
        return self.listen

    def kill(self) -> None:
        """End the process as a crash does."""
        self.process.kill()
        self.process.communicate()

    def terminate(self) -> int:
        """Ask the process to end; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode

    def restart(self) -> None:
        """Kill the process and start another one."""
        self.kill()
        self.start()


@pytest.fixture
def servers(tmp_path):
    """Return a function that starts servers; those that still run are killed at the end."""
    started = []

    def start(*flags, name="pools", **options):
        started.append(Server(tmp_path / name, flags, **options))
        return started[-1].start()

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Return a server that all tests share; their pools have names of their own."""
    running = Server(tmp_path_factory.mktemp("server") / "pools", ("--max-pools", "1024")).start()
    yield running
    running.kill()


@pytest.fixture(scope="session")
def service(server):
    """Return a client of the shared server."""
    with Client(server.target) as client:
        yield client


@pytest.fixture
def name():
    """Return a name that no pool has."""
    return f"pool-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def pool(service, name):
    """Return a new pool of 4,096 tokens whose engine can do everything."""
    return open_pool(service, name)


def open_pool(service: Client, name: str, **fields: object) -> PoolClient:
    """Open a pool of 4,096 tokens whose engine can do everything, but for `fields`."""
    usual = {
        "geometry": GEOMETRY,
        "capacity_tokens": CAPACITY_TOKENS,
        "moves": types.MOVES_ANY,
        "single_ordered_stream": True,
        "copies_may_overlap": True,
    }
    return service.open_pool(name, **usual | fields)


def books(service: Client, name: str) -> tuple[str, list[str]]:
    """Return all that can be known of a pool, but for the time."""
    pool = service.get_pool(name)
    pool.summary.idle_seconds = 0
    return str(pool), [str(region) for region in service.list_regions(name)]


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Return when `condition` holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true"
        time.sleep(0.01)
