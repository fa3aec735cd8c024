"""A real server for the time of a demo: `odma serve` in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from types import FrameType

from odma_service.errors import OdmaError

ODMA = (sys.executable, "-m", "odma_service")
READY = "odma ready on "
START_SECONDS = 30
STOP_SECONDS = 10


class ServerError(OdmaError):
    """The server did not start."""


@contextmanager
def own_server() -> Iterator[str]:
    """Run a server on a free loopback port, with its pools in a temporary directory.

    SIGTERM ends the demo like an exception, so that the server does not outlive it.
    """
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        with TemporaryDirectory(prefix="odma-demo-") as directory:
            process, target = start(Path(directory))
            try:
                yield target
            finally:
                stop(process)
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def start(
    directory: Path,
    listen: str = "127.0.0.1:0",
    flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    program: Sequence[str] = ODMA,
) -> tuple[subprocess.Popen[str], str]:
    """Start a server that keeps pools and log in `directory`; return it and where it listens.

    `environment`: in the place of this process's own.
    `program`: the command that is run as `odma`.
    Raises ServerError, with the end of the log, if it is not ready in `START_SECONDS`.
    """
    log = directory / "server.log"
    command = [*program, "serve", "--listen", listen]
    command += ["--pool-dir", str(directory / "pools"), "--metrics-listen", "", *flags]
    with log.open("a") as errors:
        # A session of its own: Ctrl-C is for the demo, which then stops the server.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env=environment,
        )
    assert process.stdout is not None
    deadline = Timer(START_SECONDS, process.kill)
    deadline.start()
    line = process.stdout.readline()
    deadline.cancel()
    if not line.startswith(READY):
        stop(process)
        raise ServerError(f"the server did not start: {log.read_text()[-2000:].strip()}")
    return process, line.removeprefix(READY).strip()


def stop(process: subprocess.Popen[str]) -> None:
    """End a server, gently at first."""
    process.terminate()
    try:
        process.communicate(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
