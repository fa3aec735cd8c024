"""What systemd is told of a service of Type=notify: see sd_notify(3)."""

from __future__ import annotations

import os
import socket

import structlog

log = structlog.get_logger()


def tell_manager(state: str) -> None:
    """Tell a state, as "READY=1", to the manager that waits for it; without one nobody is told."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.connect("\0" + address[1:] if address.startswith("@") else address)
            manager.send(state.encode())
    except OSError as error:
        log.warning("the service manager cannot be told", state=state, reason=error.strerror)
