"""A page in a browser: pools as maps of memory, live. See `odma web`."""

from __future__ import annotations

from socket import socket

import uvicorn

from odma_service.client import Client
from odma_service.web.app import application

HOST = "127.0.0.1"


def listener(port: int) -> socket:
    """Return a socket of the loopback that takes connections; port 0 is a free one.

    Raises OSError if the port is taken.
    """
    bound = socket()
    try:
        bound.bind((HOST, port))
        bound.listen()
    except OSError:
        bound.close()
        raise
    return bound


def serve(at: socket, service: Client, watcher: Client, target: str) -> None:
    """Serve the page of the service at `target` until SIGTERM or SIGINT."""
    page = application(service, watcher, target)
    uvicorn.Server(uvicorn.Config(page, log_level="error")).run([at])
