"""`odma top` in a real terminal: what it shows, and that q leaves the terminal as it was."""

from __future__ import annotations

import os
import pty
import struct
import subprocess
import termios
from contextlib import suppress
from fcntl import F_SETFL, fcntl, ioctl

from running import odma
from servers import open_pool, wait_for

from odma_service.client import Allocate, Client
from odma_service.client.local import ODMA

ROWS, COLUMNS = 40, 120


def test_a_terminal_shows_pools_and_events_until_q(servers, name):
    server = servers()  # among hundreds of pools a look takes long, for readers are paced
    with Client(server.target) as service:
        see_until_q(server, service, name)


def see_until_q(server, service, name):
    pool = open_pool(service, name)
    pool.apply(ops=[Allocate("r", 1000)])
    terminal, inside = pty.openpty()
    ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    before = termios.tcgetattr(inside)
    command = [*ODMA, "top", name, "--target", server.target]
    command += ["--metrics", "", "--every", "0.2"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
    process = subprocess.Popen(
        command, stdin=inside, stdout=inside, stderr=inside, env=environment, close_fds=True
    )
    fcntl(terminal, F_SETFL, os.O_NONBLOCK)
    shown = b""

    def shows(text: str) -> bool:
        nonlocal shown
        assert process.poll() is None, shown.decode()
        with suppress(BlockingIOError):
            shown += os.read(terminal, 1 << 16)
        return text.encode() in shown

    try:
        wait_for(lambda: shows(f"{name}: 1 free runs"), "the map")
        wait_for(lambda: shows("elastic"), "the pool's policy")
        other = f"{name[-6:]}-is-new"

        def is_told() -> bool:
            open_pool(service, other, take_over=True)  # until the view watches too
            return shows(other)

        wait_for(is_told, "the event")
        os.write(terminal, b"q")
        wait_for(lambda: process.poll() is not None or shows("\0"), "the end")
        assert process.returncode == 0
        assert termios.tcgetattr(inside) == before
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
        os.close(inside)


def test_without_a_terminal_it_says_what_else_there_is(server):
    run = odma("top", "--target", server.target)
    assert run.returncode == 2
    assert run.stderr == "odma top: it needs a terminal; see odma status and odma watch\n"
