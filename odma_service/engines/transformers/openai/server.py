"""The server of the HTTP interface."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from odma_service.client.channel import is_local
from odma_service.engines.transformers.engine import Engine
from odma_service.engines.transformers.loading import Loaded
from odma_service.engines.transformers.memory import Memory
from odma_service.engines.transformers.openai.app import Service
from odma_service.engines.transformers.runner import Runner
from odma_service.errors import InvalidError, OdmaError

DRAIN_SECONDS = 10


def listen_on(address: str, *, allow_insecure: bool = False) -> socket.socket:
    """Return a socket that listens on host:port; port 0: any.

    Raises InvalidError for an address beyond the loopback without `allow_insecure`, for
    connections are plain; OSError if it cannot listen there.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InvalidError("listen", f"HOST:PORT, not {address!r}")
    if not is_local(address) and not allow_insecure:
        raise InvalidError("listen", "beyond the loopback only with --allow-insecure")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, int(port)), family=family)


def serve(
    loaded: Loaded,
    engine: Engine,
    pool: Memory,
    listener: socket.socket,
    key: str,
    ready: Callable[[], object],
) -> None:
    """Serve until SIGTERM or SIGINT; calls under way get `DRAIN_SECONDS` to end.

    `key`: what callers show as a bearer token; empty: nothing. `ready` is called when signals
    are heard and calls will be. Raises OdmaError if the engine cannot go on.
    """
    server: uvicorn.Server  # the runner stops it, and its application needs the runner

    def stop(*_: object) -> None:
        server.should_exit = True

    with Runner(engine, pool, stop) as runner:
        service = Service(loaded, runner, engine.longest_tokens, key)
        config = uvicorn.Config(
            service.app(),
            log_level="warning",
            timeout_graceful_shutdown=DRAIN_SECONDS,
            server_header=False,
        )
        server = uvicorn.Server(config)
        with _handled(stop):
            ready()
            server.run(sockets=[listener])
        if runner.failure is not None:
            raise OdmaError(str(runner.failure))


@contextmanager
def _handled(stop: Callable[..., None]) -> Iterator[None]:
    """Let `stop` handle signals: uvicorn, when it has ended, sends itself those that it got."""
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
