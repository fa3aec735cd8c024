"""An engine under load that remembers what it was told, and holds the books against it."""

from __future__ import annotations

import uuid
from random import Random
from typing import Any

from lab.robustness.load import RandomBatches
from lab.robustness.twin import Findings, Held, Twin
from odma_service.client import Client, PoolClient
from odma_service.errors import RefusedError, UnavailableError
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.values import Allocate, Answer, Batch, End, Free, Moves, PlaneGroup
from odma_service.wire import answer_from, batch_to, place_from

CAPACITY_TOKENS = 32_768
PLANES = [PlaneGroup(count=2, bytes_per_token=512)]


class Engine:
    """One engine: its load, its twin, and the last answer it acknowledged."""

    def __init__(
        self,
        service: Client,
        name: str,
        seed: int,
        *,
        single_stream: bool,
        take_over: bool = False,
        ttl_seconds: int = 0,
        granule_tokens: int = 0,
    ) -> None:
        self.name = name
        self.acknowledged = 0
        self._random = Random(seed)
        self._load = RandomBatches(self._random, CAPACITY_TOKENS, granule_tokens=granule_tokens)
        self._twin = Twin()
        self._how: dict[str, Any] = {
            "moves": Moves.ANY,
            "planes": PLANES,
            "capacity_tokens": CAPACITY_TOKENS,
            "single_ordered_stream": single_stream,
            "copies_may_overlap": single_stream,
            "ttl_seconds": ttl_seconds,
            "granule_tokens": granule_tokens,
            "open_id": uuid.uuid4().hex,
        }
        self.pool = service.open_pool(name, take_over=take_over, **self._how)
        self._asked: Batch | None = None  # not answered yet
        self._last: tuple[pb.ApplyRequest, Answer] | None = None

    def work(self, target: str) -> None:
        """Apply batches until there is no answer."""
        with Client(target, retry_seconds=0) as service:
            self.use(service)
            try:
                while True:
                    self.step()
            except UnavailableError:
                return

    def use(self, service: Client) -> None:
        """Go on over another connection."""
        moved = PoolClient(service, self.pool.response)
        moved.seq, moved.completed_seq = self.pool.seq, self.pool.completed_seq
        moved.pending = self.pool.pending
        moved.ref.CopyFrom(self.pool.ref)
        self.pool = moved

    def step(self) -> None:
        """Do one batch."""
        self.prepare()
        self.settle()

    def call(self) -> None:
        """Take a region and give it back, by calls of their own."""
        request_id = f"call-{self._random.randrange(2**32)}"
        try:
            place = self.pool.allocate(Allocate(request_id, prompt_tokens=1))
        except RefusedError:
            return
        self.pool.free(Free(place.handle, End.ABORTED))

    def prepare(self) -> pb.ApplyRequest:
        """Make the next batch, not sent yet."""
        batch = self._asked = self._load.batch(self._twin, self.pool.seq + 1)
        completed_seq = max(batch.completed_seq, self.pool.completed_seq)
        self.pool.pending = batch_to(
            self.pool.numbered(), batch._replace(completed_seq=completed_seq)
        )
        return self.pool.pending

    def settle(self) -> None:
        """Have the batch answered that is not yet, if there is one."""
        if self.pool.pending is not None:
            self._acknowledge(self.pool.pending, self.pool.resume())

    def forget(self, service: Client, findings: Findings) -> None:
        """Lose all but the handles of some regions; open with the same open_id and reconcile."""
        kept = {h: held for h, held in self._twin.held.items() if self._random.random() < 0.5}
        gone = self._twin.held.keys() - kept
        completed_seq = self.pool.seq
        self.pool = service.open_pool(self.name, **self._how)
        answer = self.pool.reconcile(list(kept), completed_seq=completed_seq)
        where = f"pool {self.name}, reconciled after seq {answer.last_seq}"
        for place, held in zip(answer.kept, kept.values(), strict=False):
            if place[:3] != held[1:]:
                findings.note("lost", f"{where}: {held} is at {place}")
        # A Reconcile whose first answer was lost is done again, and frees nothing any more.
        if answer.unknown or not gone.issuperset(answer.freed):
            findings.note("lost", f"{where}: {answer.unknown} unknown, {answer.freed} freed")
        self._twin = Twin(kept)

    def _acknowledge(self, request: pb.ApplyRequest, answer: Answer) -> None:
        assert self._asked is not None
        self._twin = self._twin.after(self._asked.ops, answer)
        self._asked = None
        self._last = request, answer
        self.acknowledged += 1

    def examine(self, service: Client, findings: Findings) -> None:
        """Hold the books of a service that was started again against the twin."""
        self.use(service)
        where = f"pool {self.name}, after seq {self.pool.seq}"
        facts = service.get_pool(self.name)
        pending = self.pool.pending
        if pending is not None and facts.last_seq == pending.seq:
            answer = self.pool.resume()
            if not answer.replayed:
                findings.note("wrong_replays", f"{where}: seq {answer.seq} was done twice")
            self._acknowledge(pending, answer)
        if facts.last_seq != self.pool.seq:
            findings.note("lost", f"{where}: the books are at seq {facts.last_seq}")
            return
        self._compare(where, facts, service.list_regions(self.name), findings)
        self._ask_again(where, service, findings)
        if pending is not None and self.pool.pending is not None:
            self._acknowledge(pending, self.pool.resume())

    def _compare(
        self,
        where: str,
        facts: pool_pb.GetPoolResponse,
        regions: list[pool_pb.Region],
        findings: Findings,
    ) -> None:
        live = [
            Held(region.request_id, *place_from(region.place)[:3])
            for region in regions
            if region.state == pool_pb.REGION_STATE_LIVE
        ]
        not_held = facts.summary.free_tokens + facts.awaiting_completion_tokens
        findings.compare(where, self._twin, live, CAPACITY_TOKENS - not_held)

    def _ask_again(self, where: str, service: Client, findings: Findings) -> None:
        if self._last is None:
            return
        request, answer = self._last
        request.pool.CopyFrom(self.pool.numbered())
        again = answer_from(service.call(service.memory.Apply, request))
        if not again.replayed:
            findings.note("wrong_replays", f"{where}: seq {request.seq} was done twice")
        if again._replace(replayed=answer.replayed) != answer:
            findings.note("wrong_replays", f"{where}: seq {request.seq} was answered otherwise")
