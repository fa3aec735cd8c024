"""A real server for the time of a demo: `odma serve` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer

from odma_service.errors import OdmaError

READY = "odma ready on "
START_SECONDS = 30
STOP_SECONDS = 10


class ServerError(OdmaError):
    """The server did not start."""


@contextmanager
def own_server() -> Iterator[str]:
    """Run a server on a free loopback port, with its pools in a temporary directory."""
    with TemporaryDirectory(prefix="odma-demo-") as directory:
        process, target = start(Path(directory))
        try:
            yield target
        finally:
            stop(process)


def start(directory: Path, listen: str = "127.0.0.1:0") -> tuple[subprocess.Popen[str], str]:
    """Start a server that keeps pools and log in `directory`; return it and its address."""
    log = directory / "server.log"
    command = [sys.executable, "-m", "odma_service", "serve", "--listen", listen]
    command += ["--pool-dir", str(directory / "pools")]
    with log.open("a") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    deadline = Timer(START_SECONDS, process.kill)
    deadline.start()
    line = process.stdout.readline()
    deadline.cancel()
    if not line.startswith(READY):
        stop(process)
        raise ServerError(f"the server did not start: {log.read_text()[-2000:].strip()}")
    return process, line.removeprefix(READY).split(",")[0].strip()


def stop(process: subprocess.Popen[str]) -> None:
    """End a server, gently at first."""
    process.terminate()
    try:
        process.communicate(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
