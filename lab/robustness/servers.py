"""Server processes to measure: the service and the echo, plain or with TLS."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lab.bench.building import BenchError
from odma_service.client import Client, Tls
from odma_service.client.local import start, stop


class Pair(NamedTuple):
    """PEM files of a certificate for 127.0.0.1 that signs itself."""

    cert: Path
    key: Path


class Server(NamedTuple):
    """A server process and a connection to it."""

    process: subprocess.Popen[str]
    client: Client
    target: str

    def cpu_seconds(self) -> float:
        """Return the CPU time of its threads so far."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def resident_bytes(pid: int) -> int:
    """Return the memory that a process has in use."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def certificate(directory: Path) -> Pair | None:
    """Make a certificate in a directory, None without the command openssl."""
    openssl = shutil.which("openssl")
    if openssl is None:
        return None
    pair = Pair(directory / "cert.pem", directory / "key.pem")
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=odma bench"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(pair.key), "-out", str(pair.cert)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        raise BenchError(f"openssl made no certificate: {made.stderr[-500:]}")
    pair.key.chmod(0o600)
    return pair


@contextmanager
def service_of(
    directory: Path, pair: Pair | None = None, *, collector: str | None = None
) -> Iterator[Server]:
    """Run the service with its pools in a directory, and its traces going to an address."""
    directory.mkdir()
    flags = ["--tls-cert", str(pair.cert), "--tls-key", str(pair.key)] if pair else []
    environment = dict(os.environ)
    if collector:
        flags.append("--traces")
        environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://{collector}"
    process, target = start(directory, flags=flags, environment=environment)
    try:
        with _connected(target, pair) as client:
            yield Server(process, client, target)
    finally:
        stop(process)


@contextmanager
def echo_of(style: str, pair: Pair | None = None) -> Iterator[Server]:
    """Run the echo in one style."""
    command = [sys.executable, "-m", "lab.bench.echo", style, *map(str, pair or ())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    try:
        target = process.stdout.readline().strip()
        if not target:
            raise BenchError("the echo did not start")
        with _connected(target, pair) as client:
            yield Server(process, client, target)
    finally:
        process.kill()
        process.communicate()


def _connected(target: str, pair: Pair | None) -> Client:
    return Client(target, tls=Tls(pair.cert) if pair else None)
