"""A serving engine's decode step against ODMA, with a pretend device.

    python engine.py 127.0.0.1:50051

The device memory is a list of token ids. The engine executes every copy it is
told, and before each step it looks whether each token of each request lies
where the books say. It exits with 1 if one does not.

The requests are turns of conversations: each begins with all that was said
before, and computes only what is not kept any more.
"""

from __future__ import annotations

import random
import secrets
import sys
from collections import Counter, deque
from dataclasses import dataclass

from odma_service.client import (
    Allocate,
    Client,
    End,
    Extend,
    Free,
    Freed,
    Moves,
    Place,
    PlaneGroup,
    PoolClient,
    Reason,
    Refusal,
    Used,
    chained_keys,
)

CAPACITY = 4096
MODEL_LENGTH = 1024
TALKS = 25
TURNS = 4
BATCH_CAP = 32
GRANULE = 64
SALT = secrets.token_bytes(32)
FULL = (Reason.NO_SPACE, Reason.FRAGMENTED)


@dataclass(eq=False)
class Request:
    """One turn of a conversation: its cache has a place while it runs."""

    talk: int
    prompt: int
    output: int
    following: Request | None
    generated: int = 0
    place: Place | None = None
    preempt: bool = False
    keys: bytes = b""  # as the Allocate had them

    @property
    def total(self) -> int:
        return self.prompt + self.generated

    @property
    def finished(self) -> bool:
        return self.generated == self.output

    @property
    def full(self) -> bool:
        return self.total == self.place.length_tokens

    def token(self, position: int) -> int:
        return self.talk * MODEL_LENGTH + position

    def keys_now(self) -> bytes:
        return chained_keys(map(self.token, range(self.total)), GRANULE, SALT)


class Violation(Exception):
    """A token is not where the books say."""


class Engine:
    """Continuous batching, first come first served, on one ordered stream."""

    def __init__(self, pool: PoolClient, requests: list[Request]) -> None:
        self.pool = pool
        self.queue = deque(requests)
        self.running: list[Request] = []
        self.memory: list[int | None] = [None] * CAPACITY
        self.count: Counter[str] = Counter()

    def step(self) -> None:
        asked = self.plan()
        by_handle = {request.place.handle: request for request in self.running}
        answer = self.pool.apply(
            used=[
                Used(handle, request.total, shareable_tokens=request.total)
                for handle, request in by_handle.items()
            ],
            ops=[op for op, _ in asked],
            # This device has done all it was told before we ask again.
            completed_seq=self.pool.seq,
        )

        for copy in answer.copies:
            tokens = self.memory[copy.from_token : copy.from_token + copy.tokens]
            self.memory[copy.to_token : copy.to_token + copy.tokens] = tokens
            self.count.update(copies=1, copied=copy.tokens)
        for place in answer.moved:
            by_handle[place.handle].place = place
        for (_, request), result in zip(asked, answer.results, strict=True):
            self.settle(request, result, by_handle)
        self.running = [request for request in self.running if request.place]

        for request in self.running:
            self.verify(request)
        for request in self.running:
            if not request.finished and not request.full:
                request.generated += 1  # the decode step; without room it sits this one out
                self.write(request, request.total - 1)
        self.count["steps"] += 1

    def plan(self) -> list[tuple[Allocate | Extend | Free, Request]]:
        """What this step asks, and whom each operation is about."""
        asked = []
        for request in self.running:
            handle = request.place.handle
            if request.finished or request.preempt:
                end = End.FINISHED if request.finished else End.PREEMPTED
                more = request.keys_now()[len(request.keys) :]
                op = Free(handle, end, request.generated, request.total, more)
                asked.append((op, request))
            elif request.full:
                asked.append((Extend(handle, request.total + 1), request))
        for request in list(self.queue)[: BATCH_CAP - len(self.running)]:
            request.keys = request.keys_now()
            op = Allocate(
                f"talk-{request.talk}",
                request.prompt,
                generated_tokens=request.generated,
                max_total_tokens=MODEL_LENGTH,
                keys=request.keys,
            )
            asked.append((op, request))
        return asked

    def settle(
        self, request: Request, result: Place | Refusal | Freed, by_handle: dict[int, Request]
    ) -> None:
        """Take the outcome of one operation into the engine's own state."""
        match result:
            case Place() if request.place:
                request.place = result
            case Place():  # admitted: the prefill computes at once all that is not there yet
                self.queue.remove(request)
                self.running.append(request)
                request.place = result
                self.count.update(prefilled=request.total, reused=result.reused_tokens)
                self.write(request, result.reused_tokens)
            case Refusal(reason=reason):
                self.count["refusals"] += reason is not Reason.SKIPPED
                victim = by_handle.get(result.preempt_handle)
                if victim and victim.place and reason in FULL:
                    victim.preempt = True
            case Freed():
                request.place, request.preempt = None, False
                if request.finished:
                    self.count["finished"] += 1
                    if request.following:  # first, while what it continues is kept
                        self.queue.appendleft(request.following)
                else:
                    self.count["preempted"] += 1
                    self.queue.appendleft(request)

    def write(self, request: Request, first: int) -> None:
        for i in range(first, request.total):
            self.memory[request.place.start_token + i] = request.token(i)

    def verify(self, request: Request) -> None:
        for i in range(request.total):
            if self.memory[request.place.start_token + i] != request.token(i):
                raise Violation(f"token {i} of conversation {request.talk}")
        self.count["checked"] += request.total


def conversation(talk: int, rng: random.Random) -> Request:
    """The first turn of a conversation, with those that follow it."""
    total, turns, following = 0, [], None
    for _ in range(TURNS):
        prompt = total + rng.randrange(16, 100)
        output = min(1 + int(rng.paretovariate(1.1) * 30), 150)
        total = prompt + output
        turns.append((prompt, output))
    for prompt, output in reversed(turns):
        following = Request(talk, prompt, output, following)
    return following


def main() -> None:
    rng = random.Random(7)
    requests = [conversation(talk, rng) for talk in range(TALKS)]
    target = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
    with Client(target) as service:
        pool = service.open_pool(
            name="example-python",
            planes=[PlaneGroup(count=56, bytes_per_token=1024)],
            capacity_tokens=CAPACITY,
            model_length_tokens=MODEL_LENGTH,
            moves=Moves.ANY,
            single_ordered_stream=True,
            copies_may_overlap=True,
            granule_tokens=GRANULE,
            take_over=True,  # the memory of an earlier run is gone, and so is its owner
        )
        engine = Engine(pool, requests)
        while engine.queue or engine.running:
            engine.step()
        if service.get_pool("example-python").summary.free_tokens != CAPACITY:
            raise Violation("the books do not balance")
        pool.close_pool()
    print(", ".join(f"{name} {n}" for name, n in engine.count.items()))


if __name__ == "__main__":
    try:
        main()
    except Violation as violation:
        sys.exit(f"violation: {violation}")
