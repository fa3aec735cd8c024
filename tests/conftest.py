"""A real server for the tests that talk to one, and the books to compare before and after."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer

import pytest

from odma_service.client import Client, PoolClient
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.service.pools.registry import Opened, Registry
from odma_service.service.rpc.opening import first_policy, spec_from
from odma_service.values import Moves, Place, PlaneGroup, PolicyChange
from odma_service.wire import place_from, planes_to

READY = "odma ready on "
PATIENCE_SECONDS = 30
PLANES = [PlaneGroup(count=2, bytes_per_token=64)]
GEOMETRY = types.Geometry(planes=planes_to(PLANES))
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
        """End the process as a crash does, if it still runs."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

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
        "planes": PLANES,
        "capacity_tokens": CAPACITY_TOKENS,
        "moves": Moves.ANY,
        "single_ordered_stream": True,
        "copies_may_overlap": True,
    }
    return service.open_pool(name, **usual | fields)


def places_of(service: Client, name: str) -> dict[str, Place]:
    """Return where the regions of a pool lie, by request id."""
    return {r.request_id: place_from(r.place) for r in service.list_regions(name)}


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


# --- a network that fails ---


class Wire:
    """A network between a client and a server that can hold answers back and lose them."""

    def __init__(self, target):
        host, _, port = target.rpartition(":")
        self._server = (host, int(port))
        self._answers_pass = threading.Event()
        self._answers_pass.set()
        self._open = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def hold_answers(self):
        self._answers_pass.clear()

    def lose_answers(self):
        """Cut all connections; what is asked from now on is answered."""
        for connection in self._open:
            connection.close()
        self._answers_pass.set()

    def close(self):
        self._listener.close()
        self.lose_answers()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                connection = Connection(client, socket.create_connection(self._server))
                self._open.append(connection)
                for pump in (connection.ask, connection.answer):
                    threading.Thread(target=pump, args=(self._answers_pass,), daemon=True).start()


class Connection:
    """Both halves of a connection, and a thread for each direction."""

    def __init__(self, client, server):
        self._client, self._server = client, server
        self._cut = False

    def ask(self, _):
        self._pump(self._client, self._server, None)

    def answer(self, may_pass):
        self._pump(self._server, self._client, may_pass)

    def close(self):
        self._cut = True
        for half in (self._client, self._server):
            with suppress(OSError):
                half.shutdown(socket.SHUT_RDWR)

    def _pump(self, source, sink, may_pass):
        with suppress(OSError):
            while data := source.recv(65536):
                if may_pass:
                    may_pass.wait()
                if self._cut:
                    break
                sink.sendall(data)
        self.close()
        source.close()


@pytest.fixture
def wire(server):
    wire = Wire(server.target)
    yield wire
    wire.close()


# --- a registry without a server ---


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    """Return the clock of the test's registries."""
    return Clock()


@pytest.fixture
def registry(tmp_path, clock):
    """Return an empty registry."""
    registry = registry_of(tmp_path, clock)
    yield registry
    registry.close()


def registry_of(
    directory: Path, clock: Clock, max_pools: int = 3, boot_id: str = "boot"
) -> Registry:
    """Return a registry of what is in a directory."""
    return Registry(
        directory,
        max_pools=max_pools,
        max_owner_pools=max_pools,
        boot_id=boot_id,
        monotonic=clock,
        wall=clock,
    )


def open_in(registry: Registry, name: str, **fields: object) -> Opened:
    """Open a pool of 1,024 tokens, but for `fields`."""
    usual = {"open_id": name, "capacity_tokens": 1024, "moves": Moves.ANY}
    spec = spec_from(pb.OpenPoolRequest(name=name, geometry=GEOMETRY, **usual | fields))
    policy = first_policy(PolicyChange(), spec)
    return registry.open(spec, policy, keep_policy=True, take_over=False)


def state(registry: Registry, name: str) -> tuple[int, float]:
    """Return the running epoch of a pool and for how long its owner has been silent."""
    with registry.viewed(name) as view:
        return view.pool.epoch, view.idle_seconds
