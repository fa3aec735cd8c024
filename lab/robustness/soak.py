"""`odma bench soak`: engines work for as long as one likes, and everything may fail.

With faults engines crash, forget, hang, send garbage and break their streams, the server is
killed, ended and stopped, and the network delays, repeats and reorders messages. Every engine
holds the books against its twin again and again.
"""

from __future__ import annotations

import signal
import time
from array import array
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from random import Random
from threading import Event, Lock
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.message import Message

from lab.robustness.engine import Engine
from lab.robustness.proxy import Proxy, Weather
from lab.robustness.servers import resident_bytes
from lab.robustness.twin import Findings
from odma_service.cli.failures import BadResultError
from odma_service.cli.options import AsJson
from odma_service.cli.output import show
from odma_service.client import Client
from odma_service.client.local import start, stop
from odma_service.errors import OdmaError
from odma_service.replay.workplace import workplace
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1.memory_service_pb2_grpc import MemoryServiceStub

ENGINES = 6
TTL_SECONDS = 1
HANG_SECONDS = 1.2  # longer than the ttl
STEPS_BETWEEN_LOOKS = (10, 60)
STEPS_A_CALL = 10
TIMEOUT_SECONDS = 1.0
PATIENCE_SECONDS = 60.0
LIFE_SECONDS = (1.5, 4.0)
STOPPED_SECONDS = 1.5  # longer than the timeout
SAMPLE_SECONDS = 0.25
KINDS = ("lost", "doubled", "leaked", "wrong_replays")
BUGS = ("INTERNAL", "UNKNOWN")
RPCS = ("OpenPool", "ClosePool", "Apply", "Allocate", "Free", "Reconcile", "SetPolicy")
NO_BATCH = pb.StreamRequest()


app = typer.Typer()


@app.command()
def command(
    minutes: Annotated[float, typer.Option(min=0.01, max=10_000, help="Minutes to run.")] = 1.0,
    faults: Annotated[
        bool, typer.Option("--faults", help="Let engines, server and network fail, too.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the loads and of the faults.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Let six engines work, by calls and by streams, and compare all the time.

    Exit code 1: something was lost, doubled, leaked or answered differently the second time, or
    if a call ended with INTERNAL or UNKNOWN.
    """
    with workplace() as directory:
        figures, findings = soak(directory, minutes, seed, faults=faults)
    show(figures, as_json)
    bugs = [
        f"{figures['errors'][code]} calls ended with {code}"
        for code in BUGS
        if code in figures["errors"]
    ]
    if findings.words or bugs:
        raise BadResultError(*findings.words, *bugs)


class CallCounts:
    """What the calls of all engines came to."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.calls = 0
        self.errors: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.seconds = array("d")

    def called(self, seconds: float | None, code: str | None) -> None:
        """Count one attempt: how long it took, or the status that it ended with."""
        with self._lock:
            self.calls += 1
            if code is not None:
                self.errors[code] += 1
            elif seconds is not None:
                self.seconds.append(seconds)

    def failed(self, what: str) -> None:
        """Count one fault of an engine or of the server."""
        with self._lock:
            self.faults[what] += 1


class CountingClient(Client):
    """A client whose every attempt is counted."""

    def __init__(self, target: str, tally: CallCounts) -> None:
        super().__init__(target, timeout_seconds=TIMEOUT_SECONDS, retry_seconds=PATIENCE_SECONDS)
        self._tally = tally

    def call(self, method: Callable[..., Any], request: Message, *, retry: bool = True) -> Any:
        """Do as Client does, and count."""

        def counted(request: Message, **how: Any) -> Any:
            begun = time.monotonic()
            try:
                answer = method(request, **how)
            except grpc.RpcError as error:
                self._tally.called(None, error.code().name)
                raise
            self._tally.called(time.monotonic() - begun, None)
            return answer

        return super().call(counted, request, retry=retry)


class Subject:
    """One engine in a thread, what it does and what befalls it."""

    def __init__(self, number: int, target: str, seed: int, findings: Findings, tally: CallCounts):
        self._name = f"engine-{number}"
        self._single_stream = number % 2 == 0
        self._streaming = number % 3 != 0
        self._target = target
        self._random = Random(seed)
        self._findings = findings
        self._tally = tally
        self.acknowledged = 0

    def live(self, over: Event, *, faults: bool) -> None:
        """Work until it is over, which it is for everybody once something was found wrong."""
        try:
            self._live(over, faults=faults)
        except OdmaError as error:
            self._findings.note("lost", f"pool {self._name}: {type(error).__name__}: {error}")
        finally:
            if self._findings.words:
                over.set()

    def _live(self, over: Event, *, faults: bool) -> None:
        befalls = (self._crash, self._forget, self._break, self._hang, self._rave)
        with self._connected() as service:
            engine = self._new(service, take_over=False)
        while not over.is_set():
            with self._connected() as service:
                engine.use(service)
                self._work(engine)
                engine.examine(service, self._findings)
                if faults and not over.is_set():
                    engine = self._random.choice(befalls)(engine, service)
            if self._findings.words:
                break
        self.acknowledged += engine.acknowledged

    def _work(self, engine: Engine) -> None:
        with engine.pool.stream() if self._streaming else nullcontext():
            for _ in range(self._random.randint(*STEPS_BETWEEN_LOOKS)):
                engine.step()
                if self._random.randrange(STEPS_A_CALL) == 0:
                    engine.call()

    def _crash(self, engine: Engine, service: Client) -> Engine:
        """Go in the middle of a call; somebody else takes the pool over."""
        self._tally.failed("crash")
        service.memory.Apply.future(engine.prepare())
        service.close()
        self.acknowledged += engine.acknowledged
        with self._connected() as another:
            return self._new(another, take_over=True)

    def _forget(self, engine: Engine, service: Client) -> Engine:
        self._tally.failed("forget")
        engine.forget(service, self._findings)
        return engine

    def _break(self, engine: Engine, service: Client, seconds: float = 0.0) -> Engine:
        """Cut a stream before its answer is there, and have the batch answered by a call."""
        self._tally.failed("hang" if seconds else "break")
        call = service.memory.Stream(iter([pb.StreamRequest(apply=engine.prepare())]))
        time.sleep(seconds)
        call.cancel()
        engine.settle()
        engine.examine(service, self._findings)
        return engine

    def _hang(self, engine: Engine, service: Client) -> Engine:
        """Take no answer for so long that the pool becomes stale."""
        return self._break(engine, service, HANG_SECONDS)

    def _rave(self, engine: Engine, service: Client) -> Engine:
        """Send what is no batch of this epoch, or no message at all; then the real one."""
        self._tally.failed("garbage")
        good = engine.prepare()
        with grpc.insecure_channel(self._target) as channel:
            for rpc in RPCS:
                raw: Any = channel.unary_unary(f"/odma.v1.MemoryService/{rpc}")
                for message in _garbage(self._random, good):
                    self._send(raw, message)
            stub = MemoryServiceStub(channel)
            self._send(stub.Apply, _with_a_gap(good))
            self._send(lambda request, **how: next(stub.Stream(iter([request]), **how)), NO_BATCH)
        engine.settle()
        engine.examine(service, self._findings)
        return engine

    def _send(self, method: Callable[..., Any], request: Any) -> None:
        begun = time.monotonic()
        try:
            method(request, timeout=TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            self._tally.called(None, error.code().name)
        else:
            self._tally.called(time.monotonic() - begun, None)

    def _new(self, service: Client, *, take_over: bool) -> Engine:
        return Engine(
            service,
            self._name,
            self._random.randrange(2**32),
            single_stream=self._single_stream,
            take_over=take_over,
            ttl_seconds=TTL_SECONDS,
        )

    def _connected(self) -> CountingClient:
        return CountingClient(self._target, self._tally)


def _garbage(random: Random, good: pb.ApplyRequest) -> list[bytes]:
    """Return random bytes, and a batch of an epoch that never was, mutilated in two ways."""
    foreign = pb.ApplyRequest()
    foreign.CopyFrom(good)
    foreign.pool.epoch = 1  # no change of one byte makes it the right one
    text = bytearray(foreign.SerializeToString())
    cut = bytes(text[: random.randrange(1, len(text))])
    text[random.randrange(len(text))] = random.randrange(256)
    return [random.randbytes(random.randrange(1, 200)), bytes(text), cut]


def _with_a_gap(good: pb.ApplyRequest) -> pb.ApplyRequest:
    gap = pb.ApplyRequest()
    gap.CopyFrom(good)
    gap.seq += 7
    return gap


class Host:
    """The server process, what is done to it, and how much memory each life of it takes.

    A life's first half warms up: threads come with the first busy moments, and stay.
    """

    def __init__(self, directory: Path, seed: int, tally: CallCounts) -> None:
        self._directory = directory
        self._random = Random(seed)
        self._tally = tally
        self._process, self.target = start(directory)
        self._samples: list[int] = []
        self.most_bytes = 0
        self.growth_bytes: list[int] = []  # of each life, in its second half

    def serve(self, seconds: float) -> None:
        """Let it serve for so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(SAMPLE_SECONDS)
            self._samples.append(resident_bytes(self._process.pid))
            self.most_bytes = max(self.most_bytes, self._samples[-1])

    def fail(self) -> None:
        """Kill it, end it or stop it, and have it serve again."""
        how = self._random.choice(("kill", "end", "stop"))
        self._tally.failed(f"server {how}")
        if how == "stop":
            self._process.send_signal(signal.SIGSTOP)
            time.sleep(STOPPED_SECONDS)
            self._process.send_signal(signal.SIGCONT)
            return
        self._process.send_signal(signal.SIGKILL if how == "kill" else signal.SIGTERM)
        self._process.communicate()
        self._end_life()
        self._process, _ = start(self._directory, self.target)

    def close(self) -> None:
        """End it for good."""
        self._end_life()
        stop(self._process)

    def _end_life(self) -> None:
        if len(self._samples) > 1:
            self.growth_bytes.append(self._samples[-1] - self._samples[len(self._samples) // 2])
        self._samples = []


def soak(
    directory: Path, minutes: float, seed: int, *, faults: bool
) -> tuple[dict[str, Any], Findings]:
    """Run it, and return what came of it."""
    findings, tally, over = Findings(), CallCounts(), Event()
    random = Random(seed)
    begun = time.monotonic()
    host = Host(directory, random.randrange(2**32), tally)
    weather = Weather(random.randrange(2**32))
    proxy = Proxy(host.target, weather.choose)
    target = proxy.target if faults else host.target
    subjects = [
        Subject(number, target, random.randrange(2**32), findings, tally)
        for number in range(ENGINES)
    ]
    try:
        with ThreadPoolExecutor(ENGINES) as threads:
            work = [threads.submit(subject.live, over, faults=faults) for subject in subjects]
            try:
                while (left := begun + 60 * minutes - time.monotonic()) > 0 and not over.is_set():
                    host.serve(min(random.uniform(*LIFE_SECONDS), left))
                    if faults and left > LIFE_SECONDS[1]:
                        host.fail()
            finally:
                over.set()
            for done in work:
                done.result()
    finally:
        weather.close()
        proxy.close()
        host.close()
    return {
        "minutes": round((time.monotonic() - begun) / 60, 2),
        "calls": tally.calls,
        "batches": sum(subject.acknowledged for subject in subjects),
        "errors": dict(tally.errors),
        "faults": dict(tally.faults),
        "messages": dict(weather.counts),
        **{kind: getattr(findings, kind) for kind in KINDS},
        **{f"p{percent}_ms": _percentile_ms(tally.seconds, percent) for percent in (50, 99)},
        "memory": {
            "most_resident_bytes": host.most_bytes,
            "most_growth_bytes_in_second_half_of_a_life": max(host.growth_bytes, default=None),
            "lives": len(host.growth_bytes),
        },
        "seed": seed,
    }, findings


def _percentile_ms(seconds: array[float], percent: int) -> float | None:
    if not seconds:
        return None
    return round(sorted(seconds)[len(seconds) * percent // 100] * 1e3, 3)
