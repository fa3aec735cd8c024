"""`odma bench readers`: what greedy readers cost an engine.

One server, one engine that sends decode steps, and one process whose threads read as fast as they
get answers, each over a connection of its own. The engine is timed alone and beside the readers
in turn, so that a busy moment of the machine hits both.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from statistics import median
from typing import Annotated, Any

import grpc
import typer
from rich.table import Table

from lab.bench.decode_step import DecodeStep
from lab.robustness.servers import Server, service_of
from odma_service.cli.options import AsJson
from odma_service.cli.output import show
from odma_service.replay.workplace import workplace
from odma_service.rpc.v1 import emulator_service_pb2 as emulator_pb
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb

POOL = "read"
OPERATIONS = 16
WARM_UP = 50
GOAL_RATIO = 1.5
KINDS: dict[str, tuple[str, Callable[[], Any]]] = {
    "GetPool": ("/odma.v1.PoolService/GetPool", lambda: pool_pb.GetPoolRequest(name=POOL)),
    "ListPools": ("/odma.v1.PoolService/ListPools", pool_pb.ListPoolsRequest),
    "ListRegions": (
        "/odma.v1.PoolService/ListRegions",
        lambda: pool_pb.ListRegionsRequest(name=POOL, page_size=10_000),
    ),
    "EstimateAccess": (
        "/odma.v1.EmulatorService/EstimateAccess",
        lambda: emulator_pb.EstimateAccessRequest(
            runs=[emulator_pb.Run(offset_bytes=i << 12, length_bytes=64) for i in range(131_072)]
        ),
    ),
}

app = typer.Typer()


@app.command()
def command(
    readers: Annotated[int, typer.Option(min=1, max=256, help="Threads that read.")] = 30,
    steps: Annotated[int, typer.Option(min=10, help="Timed steps of a run.")] = 200,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of which the median counts.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Time Apply alone and beside greedy readers. The goal is shown, not enforced."""
    with workplace() as directory, service_of(directory / "readers") as service:
        step = DecodeStep(service.client, POOL, OPERATIONS, predicted=False)
        _time(service, step, WARM_UP)
        told = {kind: _of_kind(service, step, kind, readers, steps, repeats) for kind in KINDS}
    show({"readers": readers, "goal_ratio": GOAL_RATIO, "kinds": told}, as_json, _picture)


def _of_kind(
    service: Server, step: DecodeStep, kind: str, readers: int, steps: int, repeats: int
) -> dict[str, float]:
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        alone = _time(service, step, steps)
        with _reading(service.target, kind, readers):
            _time(service, step, WARM_UP)
            beside = _time(service, step, steps)
        runs.append(
            {
                **{f"alone_{name}": value for name, value in alone.items()},
                **{f"beside_{name}": value for name, value in beside.items()},
                **{f"{name[:3]}_ratio": beside[name] / alone[name] for name in alone},
            }
        )
    return {name: round(median(run[name] for run in runs), 2) for name in runs[0]}


def _time(service: Server, step: DecodeStep, steps: int) -> dict[str, float]:
    taken = []
    for _ in range(steps):
        ahead = step.ahead()
        begun = time.perf_counter()
        answer = service.client.memory.Apply(ahead, timeout=60)
        taken.append(time.perf_counter() - begun)
        step.went(answer)
        step.came(service.client.memory.Apply(step.back(), timeout=60))
    taken.sort()
    return {
        "p50_us": taken[len(taken) // 2] * 1e6,
        "p99_us": taken[len(taken) * 99 // 100] * 1e6,
    }


@contextmanager
def _reading(target: str, kind: str, readers: int) -> Iterator[None]:
    """Let a process read, from its first answer on."""
    command = [sys.executable, "-m", "lab.bench.readers", target, kind, str(readers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


def _read(target: str, kind: str, readers: int) -> None:
    """Read until killed; tell when the first answer is there."""
    rpc, request = KINDS[kind]
    message = request().SerializeToString()
    first = threading.Event()

    channels = [
        grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)])
        for _ in range(readers)
    ]

    def read(channel: grpc.Channel) -> None:
        call: Any = channel.unary_unary(rpc)
        while True:
            with suppress(grpc.RpcError):
                call(message)
            first.set()

    for channel in channels:
        grpc.channel_ready_future(channel).result()
    for channel in channels:
        threading.Thread(target=read, args=(channel,), daemon=True).start()
    first.wait()
    print(kind, flush=True)  # noqa: T201
    threading.Event().wait()


def _picture(figures: dict[str, Any]) -> Table:
    title = f"Apply beside {figures['readers']} readers, µs (goal: {figures['goal_ratio']} times)"
    table = Table("readers call", title=title, box=None)
    for name in ("p50 alone", "beside", "ratio", "p99 alone", "beside", "ratio"):
        table.add_column(name, justify="right")
    for kind, told in figures["kinds"].items():
        cells = (
            f"{told[f'alone_{p}_us']:,.0f} {told[f'beside_{p}_us']:,.0f} {told[f'{p}_ratio']:.2f}"
            for p in ("p50", "p99")
        )
        table.add_row(kind, *" ".join(cells).split())
    return table


if __name__ == "__main__":
    _read(sys.argv[1], sys.argv[2], int(sys.argv[3]))
