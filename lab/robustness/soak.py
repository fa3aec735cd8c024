"""`odma bench soak`: engines work for as long as one likes, and everything may fail.

With faults engines crash, forget, hang, send garbage and break their streams, one is a process that
is stopped; the server is killed, ended and stopped, its disk is full and another wants its
directory; and the network delays, repeats and reorders messages. Every engine holds the books
against its twin again and again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from random import Random
from threading import Event, Thread, Timer
from typing import Annotated, Any

import grpc
import typer

from lab.robustness.counting import TIMEOUT_SECONDS, CallCounts, CountingClient
from lab.robustness.engine import Engine
from lab.robustness.host import Host, stop_for_a_while
from lab.robustness.proxy import Proxy, Weather
from lab.robustness.twin import Findings
from odma_service.cli.failures import BadResultError
from odma_service.cli.options import AsJson
from odma_service.cli.output import show
from odma_service.client import Client
from odma_service.errors import OdmaError
from odma_service.replay.workplace import workplace
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1.memory_service_pb2_grpc import MemoryServiceStub

ENGINES = 6
TTL_SECONDS = 1
HANG_SECONDS = 1.2  # longer than the ttl
STEPS_BETWEEN_LOOKS = (10, 60)
STEPS_A_CALL = 10
END_SECONDS = 120
LIFE_SECONDS = (1.5, 4.0)
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


class Apart:
    """An engine in a process of its own: it can be stopped."""

    def __init__(self, number: int, target: str, seed: int, tally: CallCounts) -> None:
        self._tally = tally
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lab.robustness.soak", str(number), target, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def stop(self) -> None:
        """Stop it for a while."""
        self._tally.failed("engine stop")
        stop_for_a_while(self._process)

    def end(self, findings: Findings) -> int:
        """End it, take over what it found, and return how many batches it acknowledged."""
        end = Timer(END_SECONDS, self._process.kill)
        end.start()
        told, _ = self._process.communicate()
        end.cancel()
        if self._process.returncode != 0:
            findings.note("lost", f"the engine apart ended with {self._process.returncode}")
            return 0
        said = json.loads(told)
        self._tally.add(said["calls"], said["errors"], said["seconds"])
        for kind in KINDS:
            setattr(findings, kind, getattr(findings, kind) + said["findings"][kind])
        findings.words += said["findings"]["words"]
        return int(said["acknowledged"])


def _live_apart(number: int, target: str, seed: int) -> None:
    """Be an engine apart: work until stdin ends, and say on stdout what came of it."""
    findings, tally, over = Findings(), CallCounts(), Event()
    subject = Subject(number, target, seed, findings, tally)
    work = Thread(target=subject.live, args=(over,), kwargs={"faults": False})
    work.start()
    sys.stdin.read()
    over.set()
    work.join()
    said = {
        "acknowledged": subject.acknowledged,
        "calls": tally.calls,
        "errors": tally.errors,
        "seconds": list(tally.seconds),
        "findings": asdict(findings),
    }
    print(json.dumps(said))  # noqa: T201


def soak(
    directory: Path, minutes: float, seed: int, *, faults: bool
) -> tuple[dict[str, Any], Findings]:
    """Run it, and return what came of it."""
    findings, tally, over = Findings(), CallCounts(), Event()
    random = Random(seed)
    host = Host(directory, random.randrange(2**32), tally, findings)
    weather = Weather(random.randrange(2**32))
    proxy = Proxy(host.target, weather.choose)
    target = proxy.target if faults else host.target
    begun = time.monotonic()
    subjects = [
        Subject(number, target, random.randrange(2**32), findings, tally)
        for number in range(ENGINES)
    ]
    apart = Apart(ENGINES, target, random.randrange(2**32), tally) if faults else None
    befalls = [*host.befalls, apart.stop] if apart else []
    acknowledged = 0
    try:
        with ThreadPoolExecutor(ENGINES) as threads:
            work = [threads.submit(subject.live, over, faults=faults) for subject in subjects]
            try:
                while (left := begun + 60 * minutes - time.monotonic()) > 0 and not over.is_set():
                    host.serve(min(random.uniform(*LIFE_SECONDS), left))
                    if befalls and left > LIFE_SECONDS[1]:
                        random.choice(befalls)()
            finally:
                over.set()
            for done in work:
                done.result()
    finally:
        if apart:
            acknowledged = apart.end(findings)
        weather.close()
        proxy.close()
        host.close()
    return {
        "minutes": round((time.monotonic() - begun) / 60, 2),
        "calls": tally.calls,
        "batches": acknowledged + sum(subject.acknowledged for subject in subjects),
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


if __name__ == "__main__":
    _live_apart(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
