"""A real `odma serve` under load from several engines, killed and started again.

An engine stops at the first call without an answer. So after a kill nothing moves, and the
books of each pool can be held against its engine's model: at the last acknowledged seq, or one
further, if the service had done the batch whose answer never came.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

from odma_service import client
from odma_service._native import Arena, Recovery
from odma_service.bench.load import Load
from odma_service.bench.model import Findings, Held, Model, Outcome
from odma_service.client import Client, PoolClient
from odma_service.demo.server import start, stop
from odma_service.errors import OdmaError, UnavailableError
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.values import (
    Allocate,
    Batch,
    Copy,
    Extend,
    Free,
    Freed,
    Op,
    Place,
    Reason,
    Refusal,
    Result,
    Trim,
)

ENGINES = {"one": True, "two": True, "three": False, "four": False}
"""Pools, and whether their engine has one ordered stream."""

CAPACITY_TOKENS = 32_768
SHORTEST_LIFE_SECONDS, LONGEST_LIFE_SECONDS = 0.02, 0.25
GEOMETRY = types.Geometry(planes=[types.PlaneGroup(count=2, bytes_per_token=512)])


class Engine:
    """One engine: its load, its model, and the last answer it acknowledged."""

    def __init__(self, service: Client, name: str, seed: int, *, single_stream: bool) -> None:
        self.name = name
        self.acknowledged = 0
        self._load = Load(Random(seed), CAPACITY_TOKENS)
        self._model = Model()
        self._pool = service.open_pool(
            name,
            moves=types.MOVES_ANY,
            geometry=GEOMETRY,
            capacity_tokens=CAPACITY_TOKENS,
            single_ordered_stream=single_stream,
            copies_may_overlap=single_stream,
        )
        self._asked: Batch | None = None  # not answered yet
        self._last: tuple[pb.ApplyRequest, pb.ApplyResponse] | None = None

    def work(self, target: str) -> None:
        """Apply batches until there is no answer."""
        with Client(target, retry_seconds=0) as service:
            self._pool = _moved_to(service, self._pool)
            try:
                while True:
                    self._step()
            except UnavailableError:
                return

    def _step(self) -> None:
        batch = self._asked = self._load.batch(self._model, self._pool.seq + 1)
        # What apply() sends, kept to be sent again.
        request = pb.ApplyRequest(
            pool=self._pool.ref,
            seq=batch.seq,
            completed_seq=batch.completed_seq,
            pass_refused=batch.pass_refused,
            used=[client.used(*entry) for entry in batch.used],
            ops=[_op_to(op) for op in batch.ops],
        )
        answer = self._pool.apply(
            request.used,
            request.ops,
            completed_seq=batch.completed_seq,
            pass_refused=batch.pass_refused,
        )
        self._acknowledge(request, answer)

    def _acknowledge(self, request: pb.ApplyRequest, answer: pb.ApplyResponse) -> None:
        assert self._asked is not None
        self._model = self._model.after(self._asked.ops, _outcome_from(answer))
        self._asked = None
        self._last = request, answer
        self.acknowledged += 1

    def examine(self, service: Client, findings: Findings) -> None:
        """Hold the books of a service that was started again against the model."""
        self._pool = _moved_to(service, self._pool)
        where = f"pool {self.name}, after seq {self._pool.seq}"
        facts = service.get_pool(self.name)
        pending = self._pool.pending
        if pending is not None and facts.last_seq == pending.seq:
            answer = self._pool.resume()
            if not answer.replayed:
                findings.note("wrong_replays", f"{where}: seq {answer.seq} was done twice")
            self._acknowledge(pending, answer)
        if facts.last_seq != self._pool.seq:
            findings.note("lost", f"{where}: the books are at seq {facts.last_seq}")
            return
        self._compare(where, facts, service.list_regions(self.name), findings)
        self._ask_again(where, service, findings)
        if pending is not None and self._pool.pending is not None:
            self._acknowledge(pending, self._pool.resume())

    def _compare(
        self,
        where: str,
        facts: pool_pb.GetPoolResponse,
        regions: list[pool_pb.Region],
        findings: Findings,
    ) -> None:
        live = [
            Held(region.request_id, *_place_from(region.place))
            for region in regions
            if region.state == pool_pb.REGION_STATE_LIVE
        ]
        not_held = facts.summary.free_tokens + facts.awaiting_completion_tokens
        findings.compare(where, self._model, live, CAPACITY_TOKENS - not_held)

    def _ask_again(self, where: str, service: Client, findings: Findings) -> None:
        if self._last is None:
            return
        request, answer = self._last
        again = service.call(service.memory.Apply, request)
        if not again.replayed:
            findings.note("wrong_replays", f"{where}: seq {request.seq} was done twice")
        again.replayed = answer.replayed
        if again != answer:
            findings.note("wrong_replays", f"{where}: seq {request.seq} was answered otherwise")


class Tally:
    """What became of the kills so far."""

    def __init__(self) -> None:
        self.kills = 0
        self.in_batch = 0
        self.acknowledged = 0


def torture(
    directory: Path, kills: int, seed: int, findings: Findings, watch: Callable[[], None]
) -> Tally:
    """Kill a server so many times, or as many as it takes to find something wrong."""
    random, tally = Random(seed), Tally()
    if kills == 0:
        return tally
    process, target = start(directory)
    try:
        with Client(target) as service:
            engines = [
                Engine(service, name, random.randrange(2**32), single_stream=single)
                for name, single in ENGINES.items()
            ]
        while tally.kills < kills and not findings.words:
            with ThreadPoolExecutor(len(engines)) as threads:
                work = [threads.submit(engine.work, target) for engine in engines]
                time.sleep(random.uniform(SHORTEST_LIFE_SECONDS, LONGEST_LIFE_SECONDS))
                process.kill()
                process.communicate()
                for done in work:
                    done.result()
            tally.kills += 1
            tally.in_batch += _was_in_batch(directory)
            process, target = start(directory, target)
            with Client(target) as service:
                for engine in engines:
                    _examine(engine, service, findings)
            watch()
    finally:
        stop(process)
    tally.acknowledged = sum(engine.acknowledged for engine in engines)
    return tally


def _examine(engine: Engine, service: Client, findings: Findings) -> None:
    try:
        engine.examine(service, findings)
    except OdmaError as error:
        findings.note("lost", f"pool {engine.name}: {error}")


def _was_in_batch(directory: Path) -> bool:
    """Say whether a commit was half done, from copies: the server is to recover by itself."""
    found = False
    copy = directory / "copy"
    for path in sorted((directory / "pools").glob("*.pool")):
        shutil.copyfile(path, copy)
        copy.chmod(0o600)
        try:
            with Arena.attach(copy) as arena:
                found |= arena.report().recovery != Recovery.CLEAN
        except OdmaError:
            pass  # the server will find it too, and then it is lost
    copy.unlink(missing_ok=True)
    return found


# Messages


def _moved_to(service: Client, pool: PoolClient) -> PoolClient:
    """Return the owner's side of a pool, as it is, over another connection."""
    moved = PoolClient(service, pool.response)
    moved.seq, moved.completed_seq, moved.pending = pool.seq, pool.completed_seq, pool.pending
    return moved


def _op_to(op: Op) -> pb.Op:
    match op:
        case Free():
            return client.free(*op)
        case Trim():
            return client.trim(*op)
        case Extend():
            return client.extend(*op)
        case Allocate():
            return client.allocate(
                op.request_id, op.prompt_tokens, max_total_tokens=op.max_total_tokens
            )


def _outcome_from(answer: pb.ApplyResponse) -> Outcome:
    return Outcome(
        tuple(map(_result_from, answer.results)),
        tuple(
            Copy(copy.handle, copy.from_token, copy.to_token, copy.tokens, copy.overlaps)
            for copy in answer.copies
        ),
        tuple(map(_place_from, answer.moved)),
    )


def _result_from(result: pb.Result) -> Result:
    if result.HasField("place"):
        return _place_from(result.place)
    if result.HasField("refusal"):
        return Refusal(Reason(result.refusal.reason))
    return Freed()


def _place_from(place: types.Place) -> Place:
    return Place(place.handle, place.start_token, place.length_tokens)
