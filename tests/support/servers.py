"""A real server in a process of its own, its pools and their books, and a network that fails."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from odma_service.client import Client, PoolClient
from odma_service.client.local import ODMA, start
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.values import Moves, Place, PlaneGroup
from odma_service.wire import place_from, planes_to

PATIENCE_SECONDS = 30
Held = TypeVar("Held")
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("ODMA_")}
"""The environment of a server that is told by its flags alone."""

PLANES = [PlaneGroup(count=2, bytes_per_token=64)]
GEOMETRY = types.Geometry(planes=planes_to(PLANES))
CAPACITY_TOKENS = 4096


@dataclass
class Server:
    """`odma serve` as a process, with all that is its own in a directory. Its pools outlive it."""

    directory: Path
    flags: tuple[str, ...] = ()
    listen: str = "127.0.0.1:0"
    environment: dict[str, str] = field(default_factory=dict)
    program: tuple[str, ...] = ODMA

    def start(self) -> Server:
        """Start the process, on the address it had before if it had one, and wait for it."""
        self.directory.mkdir(exist_ok=True)
        self.process, self.listen = start(
            self.directory, self.listen, self.flags, PLAIN | self.environment, self.program
        )
        return self

    @property
    def pool_dir(self) -> Path:
        return self.directory / "pools"

    @property
    def log(self) -> Path:
        return self.directory / "server.log"

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
        self.process.terminate()
        self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode

    def restart(self) -> None:
        """Kill the process and start another one."""
        self.kill()
        self.start()


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


def metrics_address(server: Server) -> str:
    """Return where the log says that metrics are."""

    def told() -> list[str]:
        whole = [line for line in server.log.read_text().splitlines(True) if line.endswith("}\n")]
        return [line["metrics"] for line in map(json.loads, whole) if line["event"] == "serving"]

    return wait_for(told, "a line about the metrics")[-1]


def wait_for(condition: Callable[[], Held], what: str, seconds: float = PATIENCE_SECONDS) -> Held:
    """Return what `condition` is when it holds; fail if it does not in so many seconds."""
    deadline = time.monotonic() + seconds
    while not (held := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true"
        time.sleep(0.01)
    return held


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
