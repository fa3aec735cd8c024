"""The server of the HTTP interface."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from odma_service.client.channel import is_local
from odma_service.engines.transformers.engine import Engine
from odma_service.engines.transformers.loading import Loaded
from odma_service.engines.transformers.memory import Memory
from odma_service.engines.transformers.openai.app import Service
from odma_service.engines.transformers.runner import Runner
from odma_service.errors import InvalidError, OdmaError

DRAIN_SECONDS = 10


def serve(
    loaded: Loaded,
    engine: Engine,
    pool: Memory,
    listen: str,
    *,
    key: str = "",
    allow_insecure: bool = False,
    ready: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or SIGINT; calls under way get `DRAIN_SECONDS` to end.

    `listen` is host:port; port 0: any. `key`: what callers show as a bearer token; empty: nothing.
    `ready` gets the address. Raises InvalidError for an address beyond the loopback without
    `allow_insecure`, for the connection is plain; OdmaError if the engine cannot go on.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal():
        raise InvalidError("listen", f"HOST:PORT, not {listen!r}")
    if not is_local(listen) and not allow_insecure:
        raise InvalidError("listen", "beyond the loopback only with --allow-insecure")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, int(port)), family=family) as listener:
        server: uvicorn.Server  # the runner stops it, and its application needs the runner

        def stop() -> None:
            server.should_exit = True

        with Runner(engine, pool, stop) as runner:
            service = Service(loaded, runner, engine.longest_tokens, key)
            server = uvicorn.Server(
                uvicorn.Config(
                    service.app(),
                    log_level="warning",
                    timeout_graceful_shutdown=DRAIN_SECONDS,
                    server_header=False,
                )
            )
            at = listener.getsockname()
            ready(f"[{at[0]}]:{at[1]}" if family is socket.AF_INET6 else f"{at[0]}:{at[1]}")
            server.run(sockets=[listener])
            if runner.failure is not None:
                raise OdmaError(str(runner.failure))
