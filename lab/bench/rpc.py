"""`odma bench rpc`: what the service adds to a decode step, beside a bare echo.

Calls of the service and of the echo take turns, one by one, with the same messages, so that a
busy moment of the machine hits both. Every figure is the median of the runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.progress import Progress
from rich.table import Table

from lab.bench.decode_step import COPIES, PLANES, USED, DecodeStep
from lab.bench.keyed_step import KEYS, REQUESTS, KeyedStep
from lab.robustness.servers import Server, certificate, echo_of, resident_bytes, service_of
from odma_service.cli.options import AsJson
from odma_service.cli.output import show
from odma_service.client.stream import ApplyStream
from odma_service.replay.workplace import workplace
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.values import End, Free, Moves

OPERATIONS = (1, 16, 64)
USUAL_OPERATIONS = 16
GOALS = {"p50_ratio_16": 1.3, "p50_ratio_64": 2.0, "p50_ratio_keyed": 1.5}
STYLES = ("threads", "asyncio", "executor")
WARM_UP = 50
TIMEOUT_SECONDS = 30.0

Figures = dict[str, Any]
Send = Callable[..., pb.ApplyResponse]


app = typer.Typer()


@app.command()
def command(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of which the median counts.")] = 5,
    steps: Annotated[int, typer.Option(min=10, max=100_000, help="Timed steps of a run.")] = 200,
    as_json: AsJson = False,
) -> None:
    """Time Apply, Stream and Allocate beside a bare gRPC echo of the same messages.

    Goals are shown, not enforced: how far they hold depends on the machine.
    """
    with workplace() as directory, Progress(disable=as_json, console=Console(stderr=True)) as bar:
        task = bar.add_task("bench rpc", total=None)
        figures = measure(directory, steps, repeats, lambda: bar.advance(task))
    show(figures, as_json, _picture)


def measure(directory: Path, steps: int, repeats: int, watch: Callable[[], None]) -> Figures:
    """Return all figures; `watch` is called after each run."""
    runs = Runs(steps, repeats, watch)
    with ExitStack() as stack:
        service = stack.enter_context(service_of(directory / "plain"))
        echoes = {name: stack.enter_context(echo_of(name)) for name in STYLES}
        echo = echoes["threads"]
        figures: Figures = {
            "used": USED,
            "copies": COPIES,
            "steps": steps,
            "repeats": repeats,
            "apply": {n: runs.of_apply(service, echo, n) for n in OPERATIONS},
            "predicted": {
                n: runs.of_apply(service, echo, n, predicted=True) for n in OPERATIONS[1:]
            },
            "keys_of_a_request": KEYS,
            "keyed": {
                name: runs.of_step(
                    service, echo, KeyedStep(service.client, f"keyed-{name}", known=name == "known")
                )
                for name in ("known", "new")
            },
            "allocate": runs.of_allocate(service, echo),
            "styles": runs.of_styles(echoes),
            "resident_bytes": {
                "service": resident_bytes(service.process.pid),
                "echo": resident_bytes(echo.process.pid),
            },
        }
        figures["traced"] = "not measured: the extra otel is missing"
        if find_spec("opentelemetry"):
            to_echo = service_of(directory / "traced", collector=echo.target)
            traced = stack.enter_context(to_echo)
            figures["traced"] = {n: runs.of_apply(traced, echo, n) for n in OPERATIONS[1:]}
    pair = certificate(directory)
    figures["tls"] = "not measured: there is no command openssl"
    if pair:
        with service_of(directory / "tls", pair) as service, echo_of("threads", pair) as echo:
            figures["tls"] = {n: runs.of_apply(service, echo, n) for n in OPERATIONS[1:]}
    return {**figures, "goals": GOALS}


class Runs:
    """How much is measured, and of what."""

    def __init__(self, steps: int, repeats: int, watch: Callable[[], None]) -> None:
        self._steps = steps
        self._repeats = repeats
        self._watch = watch
        self._pools = 0

    def of_apply(
        self, service: Server, echo: Server, operations: int, *, predicted: bool = False
    ) -> Figures:
        """Time a decode step of so many operations."""
        self._pools += 1
        name = f"step-{self._pools}"
        step = DecodeStep(service.client, name, operations, predicted=predicted)
        return self.of_step(service, echo, step)

    def of_step(self, service: Server, echo: Server, step: DecodeStep | KeyedStep) -> Figures:
        """Time a step, by calls and over a stream."""

        def turn(send: Send, send_echo: Send) -> tuple[float, float]:
            ahead = step.ahead()
            if ahead.seq % 4 < 2:  # either is the first in every other turn
                took, answer = _timed(send, ahead)
                echoed, _ = _timed(send_echo, ahead)
            else:
                echoed, _ = _timed(send_echo, ahead)
                took, answer = _timed(send, ahead)
            step.went(answer)
            back = step.back()
            send_echo(back, timeout=TIMEOUT_SECONDS)
            step.came(send(back, timeout=TIMEOUT_SECONDS))
            return took, echoed

        ours, theirs = service.client.memory, echo.client.memory
        with ApplyStream(ours) as stream, ApplyStream(theirs) as echo_stream:
            turns = {
                "unary": lambda: turn(ours.Apply, theirs.Apply),
                "stream": lambda: turn(stream, echo_stream),
            }
            told = self._told(service, echo, turns)
        step.pool.close_pool()
        return told

    def of_allocate(self, service: Server, echo: Server) -> Figures:
        """Time Allocate; the region is freed again between."""
        pool = service.client.open_pool(
            "unary", moves=Moves.ANY, planes=PLANES, capacity_tokens=2**16
        )
        request = pb.AllocateRequest(
            pool=pool.ref, allocate=pb.Alloc(request_id="r", prompt_tokens=500)
        )

        def turn() -> tuple[float, float]:
            request.pool.CopyFrom(pool.numbered())
            echoed, _ = _timed(echo.client.memory.Allocate, request)
            took, answer = _timed(service.client.memory.Allocate, request)
            pool.free(Free(answer.place.handle, End.ABORTED))
            echo.client.memory.Allocate(request, timeout=TIMEOUT_SECONDS)
            return took, echoed

        told: Figures = self._told(service, echo, {"unary": turn})["unary"]
        return told

    def of_styles(self, echoes: Mapping[str, Server]) -> Figures:
        """Time the echo in each style of server."""
        used = [pb.Used(handle=2**33 + i, used_tokens=500 + i) for i in range(USED)]
        ops = [pb.Op(extend=pb.Extend(handle=u.handle, least_tokens=700)) for u in used]
        request = pb.ApplyRequest(
            pool=types.PoolRef(name="p", epoch=2**50), seq=5, used=used, ops=ops[:USUAL_OPERATIONS]
        )
        times: dict[str, dict[str, list[float]]] = {}
        with ExitStack() as stack:
            sends = {
                (style, way): send
                for style, echo in echoes.items()
                for way, send in (
                    ("unary", echo.client.memory.Apply),
                    ("stream", stack.enter_context(ApplyStream(echo.client.memory))),
                )
            }
            for _ in range(WARM_UP + self._steps * self._repeats):
                for (style, way), send in sends.items():
                    took, _ = _timed(send, request)
                    times.setdefault(style, {}).setdefault(way, []).append(took)
        self._watch()
        return {
            style: {way: _medians([_of_times(taken[WARM_UP:])]) for way, taken in ways.items()}
            for style, ways in times.items()
        }

    def _told(
        self, service: Server, echo: Server, turns: Mapping[str, Callable[[], tuple[float, float]]]
    ) -> Figures:
        """Run each kind of turn, in turn, and return its figures."""
        found: dict[str, list[Figures]] = {name: [] for name in turns}
        for turn in turns.values():
            for _ in range(WARM_UP):
                turn()
        for _ in range(self._repeats):
            for name, turn in turns.items():
                found[name].append(self._run(service, echo, turn))
                self._watch()
        return {name: _medians(runs) for name, runs in found.items()}

    def _run(
        self, service: Server, echo: Server, turn: Callable[[], tuple[float, float]]
    ) -> Figures:
        before = [server.cpu_seconds() for server in (service, echo)]
        taken = [turn() for _ in range(self._steps)]
        cpu, echo_cpu = (
            (server.cpu_seconds() - then) * 1e6 / (2 * self._steps)  # a turn is two calls
            for server, then in zip((service, echo), before, strict=True)
        )
        ours, theirs = (_of_times(list(times)) for times in zip(*taken, strict=True))
        return {
            **ours,
            **{f"echo_{name}": value for name, value in theirs.items()},
            **{
                f"{name}_ratio": ours[f"{name}_us"] / theirs[f"{name}_us"]
                for name in ("p50", "p99")
            },
            "cpu_us": cpu,
            "echo_cpu_us": echo_cpu,
        }


def _timed(send: Callable[..., Any], request: Any) -> tuple[float, Any]:
    begun = time.perf_counter()
    answer = send(request, timeout=TIMEOUT_SECONDS)
    return time.perf_counter() - begun, answer


def _of_times(seconds: list[float]) -> Figures:
    ordered = sorted(seconds)
    return {
        "p50_us": ordered[len(ordered) // 2] * 1e6,
        "p99_us": ordered[len(ordered) * 99 // 100] * 1e6,
    }


def _medians(runs: list[Figures]) -> Figures:
    return {
        name: round(median(run[name] for run in runs), 2 if "ratio" in name else 1)
        for name in runs[0]
    }


def _picture(figures: Figures) -> RenderableType:
    table = Table("microseconds", "ops", title="beside a bare echo", box=None)
    for name in ("p50", "echo", "ratio", "goal", "p99", "echo", "ratio", "CPU", "echo"):
        table.add_column(name, justify="right", no_wrap=True)
    kinds = ("", "apply"), (", predicted", "predicted"), (", traced", "traced"), (", TLS", "tls")
    for title, group in kinds:
        told = figures[group]
        if isinstance(told, str):
            table.add_row(f"Apply{title}", told)
            continue
        for operations, ways in told.items():
            for way, call in (("unary", "Apply"), ("stream", "Stream")):
                goal = GOALS.get(f"p50_ratio_{operations}", "")
                table.add_row(f"{call}{title}", str(operations), *_row(ways[way], str(goal)))
    for title, ways in figures["keyed"].items():
        for way, call in (("unary", "Apply"), ("stream", "Stream")):
            row = _row(ways[way], str(GOALS["p50_ratio_keyed"]))
            table.add_row(f"{call}, {title} keys", str(REQUESTS), *row)
    table.add_row("Allocate", "1", *_row(figures["allocate"], ""))
    styles = Table("style of the echo", "unary p50", "p99", "stream p50", "p99")
    for style, told in figures["styles"].items():
        cells = (told[way][name] for way in ("unary", "stream") for name in ("p50_us", "p99_us"))
        styles.add_row(style, *(f"{cell:,.0f}" for cell in cells))
    sizes = figures["resident_bytes"].items()
    resident = (f"resident, {name}: {size / 2**20:,.0f} MiB" for name, size in sizes)
    return Group(table, styles, *resident)


def _row(told: Figures, goal: str) -> list[str]:
    cells: list[str] = []
    for name in ("p50", "p99"):
        cells += [f"{told[f'{side}{name}_us']:,.0f}" for side in ("", "echo_")]
        cells.append(f"{told[f'{name}_ratio']:.2f}")
        if name == "p50":
            cells.append(goal)
    return [*cells, f"{told['cpu_us']:,.0f}", f"{told['echo_cpu_us']:,.0f}"]
