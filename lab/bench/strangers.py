"""`odma bench strangers`: what the service remembers of callers without a token.

Each open rpc is called again and again with random content, of which none is a known name; the
growth of the server's own memory should not depend on how often.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from rich.table import Table

from odma_service.cli.options import AsJson
from odma_service.cli.output import show
from odma_service.client.local import start, stop
from odma_service.replay.workplace import workplace

REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
FIELDS = {"/grpc.health.v1.Health/Check": 1, "/grpc.health.v1.Health/Watch": 1, REFLECTION: 4}
"""Each open rpc, and the field that holds a name."""
WARM_UP = 300
TOKENS = """[[identity]]
name = "engine"
role = "engine"
token-sha256 = "%s"
"""

app = typer.Typer()


@app.command()
def command(
    calls: Annotated[int, typer.Option(min=1, help="Calls of each rpc.")] = 10_000,
    as_json: AsJson = False,
) -> None:
    """Tell by how much the server grows with the calls of strangers."""
    with workplace() as directory:
        tokens = directory / "tokens.toml"
        tokens.touch(mode=0o600)
        tokens.write_text(TOKENS % os.urandom(32).hex())
        process, target = start(directory, flags=["--reflection", "--token-file", str(tokens)])
        try:
            with grpc.insecure_channel(target) as channel:
                grown = {rpc: _grown(channel, process.pid, rpc, calls) for rpc in FIELDS}
        finally:
            stop(process)
    show({"calls": calls, "grown_bytes": grown}, as_json, _picture)


def _grown(channel: grpc.Channel, pid: int, rpc: str, calls: int) -> int:
    call_often(channel, rpc, WARM_UP)
    before = private_bytes(pid)
    call_often(channel, rpc, calls)
    return private_bytes(pid) - before


def call_often(channel: grpc.Channel, rpc: str, calls: int) -> None:
    """Call an open rpc: each call asks for a name of 896 bytes, then sends bytes of no message."""
    call: Any = channel.stream_stream(rpc)
    for i in range(calls):
        name = os.urandom(448).hex().encode()
        size = bytes([128 | len(name) & 127, len(name) >> 7])
        message = bytes([FIELDS[rpc] << 3 | 2]) + size + name
        answers = call(iter([message, os.urandom(i % 1000 + 1)]))
        with suppress(grpc.RpcError):
            next(answers)
        answers.cancel()


def private_bytes(pid: int) -> int:
    """Return the memory that a process has for itself."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kept = [line.split() for line in lines if line.startswith(("Private_Dirty:", "Swap:"))]
    return sum(int(size) for _, size, _ in kept) * 1024


def _picture(figures: dict[str, Any]) -> Table:
    table = Table("rpc", "grown, bytes", title=f"{figures['calls']:,} calls each", box=None)
    for rpc, grown in figures["grown_bytes"].items():
        table.add_row(rpc, f"{grown:,}")
    return table
