"""A serving engine without a model: it asks for memory and moves tokens, nothing else.

    free what has ended, extend what is full, admit from the queue         one Apply
    execute the copies, check every live token
    write one token of each running request, and the prompts of new ones   the step

It runs a closed loop, first come first served; where `overtake` is set, so many of the next
in the queue may pass a request that waits for room, a bounded number of times. A step in which
nothing has to be decided makes no call. A preempted request goes back to the front of the queue
with what it had generated, and its next prefill computes that again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

from odma_service.client import PoolClient
from odma_service.demo.device import Device
from odma_service.demo.load import Request
from odma_service.demo.running import Running
from odma_service.errors import OdmaError
from odma_service.values import (
    Allocate,
    Answer,
    End,
    Extend,
    Free,
    Freed,
    Moves,
    Op,
    Place,
    Reason,
    Refusal,
    Result,
    Used,
)

ADMISSIONS = 8  # asked for in one step: after a refusal the rest would only be skipped
PATIENCE_STEPS = 1_000
MOST_PASSED = 64  # requests that pass one that waits, before all wait for it
NOBODY = 0

PREEMPT = {Reason.NO_SPACE, Reason.FRAGMENTED}
ASK_AGAIN = {Reason.COPY_BUDGET, Reason.WAITS_FOR_COMPLETION, Reason.PINNED}
BUGS = {Reason.INVALID, Reason.NOT_FOUND}


@dataclass(frozen=True, slots=True)
class EngineKind:
    """How large an engine is and what it can do.

    overtake is how far behind a waiting request the queue is tried, drop_copy the number of a
    copy to skip.
    """

    capacity_tokens: int = 111_000
    max_output_tokens: int = 4_096
    model_length_tokens: int = 16_384
    batch_cap: int = 256
    moves: Moves = Moves.ANY
    single_stream: bool = True
    copies_may_overlap: bool = True
    overtake: int = 0
    drop_copy: int = 0


class EngineError(OdmaError):
    """An answer breaks the contract, or nothing moves any more."""


class _Ended(NamedTuple):
    """A region to give back in the next batch, and what is written in it."""

    handle: int
    end: End
    output_tokens: int
    start_token: int
    tokens: int


@dataclass(slots=True)
class Tally:
    """What an engine counts. The window is from the first refusal until the queue is empty."""

    steps: int = 0
    refusals: int = 0
    preempted: int = 0
    finished: int = 0
    hit_limit: int = 0
    tokens_generated: int = 0
    window_steps: int = 0
    written_over_capacity: float = 0.0  # sums over the steps of the window
    written_over_reserved: float = 0.0
    apply_ns: list[int] = field(default_factory=list)


class Engine:
    """Plays requests against one open pool."""

    def __init__(
        self,
        pool: PoolClient,
        device: Device,
        requests: Iterable[Request],
        kind: EngineKind,
    ) -> None:
        self.tally = Tally()
        self._pool = pool
        self._device = device
        self._kind = kind
        self._queue = deque(requests)
        self._generated: dict[int, int] = {}  # before a preemption, by request number
        self._running = Running(kind.batch_cap)
        self._ended: list[_Ended] = []
        self._blocked: Reason | None = None  # why the head of the queue has to wait
        self._passed = 0  # requests that were served before the head of the queue
        self._last_refusal = "none"
        self._window_closed = False
        self._answered_step = 0
        self._progress_step = 0

    def play(self, watch: Callable[[Tally], None]) -> None:
        """Serve every request to its end and give all memory back; watch every step."""
        while self._queue or self._running.count or self._ended:
            self._step()
            watch(self.tally)
        if not self._kind.single_stream:
            self._pool.apply(completed_seq=self._pool.seq)

    def _step(self) -> None:
        self.tally.steps += 1
        room = self._pool.response.max_ops - len(self._ended)
        full = np.flatnonzero(self._running.written == self._running.lengths).tolist()[:room]
        asked = self._candidates()[: room - len(full)]
        if self._ended or full or asked:
            self._decide(full, asked)
        self._device.check()
        self._decode()
        self._measure()
        self._retire()
        if self.tally.steps - self._progress_step >= PATIENCE_STEPS:
            raise EngineError(
                f"no token in {PATIENCE_STEPS} steps: {self._running.count} requests running, "
                f"{len(self._queue)} waiting, the last refusal was {self._last_refusal}"
            )

    # Deciding

    def _candidates(self) -> list[Request]:
        """Return the requests to ask memory for: none while the last refusal still holds."""
        if self._ended:
            self._blocked = None
        if self._blocked and self._running.count:
            return []
        room = self._kind.batch_cap - self._running.count
        deep = max(ADMISSIONS, 1 + self._kind.overtake)
        return list(islice(self._queue, min(room, deep if self._passed < MOST_PASSED else 1)))

    def _decide(self, full: Sequence[int], asked: Sequence[Request]) -> None:
        """Ask one batch and do what the answer says, up to where the step begins."""
        running, ended = self._running, self._ended
        written = running.written.tolist()
        used = [Used(*region) for region in zip(running.handles, written, strict=True)]
        ops: list[Op] = [Free(run.handle, run.end, run.output_tokens) for run in ended]
        ops += [Extend(running.handles[entry], written[entry] + 1) for entry in full]
        ops += [self._allocation(request) for request in asked]
        answer = self._apply(used, ops)

        freed, rest = answer.results[: len(ended)], answer.results[len(ended) :]
        self._give_back(answer.seq, freed)
        self._device.run(answer.copies, self._movable(full))
        victims = self._grow(answer, rest[: len(full)], full)
        self._admit(asked, rest[len(full) :])
        self._device.check_regions(running.starts, running.lengths)
        self._preempt(victims)

    def _apply(self, used: Sequence[Used], ops: Sequence[Op]) -> Answer:
        completed_seq = self._completed_seq()
        started_ns = time.perf_counter_ns()
        answer = self._pool.apply(
            used, ops, completed_seq=completed_seq, pass_refused=self._kind.overtake > 0
        )
        self.tally.apply_ns.append(time.perf_counter_ns() - started_ns)
        self._answered_step = self.tally.steps
        self._device.complete(completed_seq)
        return answer

    def _completed_seq(self) -> int:
        """With several streams the step before this one may still be running."""
        late = not self._kind.single_stream and self.tally.steps - self._answered_step < 2
        return max(self._pool.seq - late, 0)

    def _allocation(self, request: Request) -> Op:
        return Allocate(
            f"request-{request.number}",
            request.prompt_tokens,
            generated_tokens=self._generated.get(request.number, 0),
            max_total_tokens=request.maximum_tokens,
            request_class=request.request_class,
        )

    def _movable(self, full: Sequence[int]) -> set[int]:
        """Return the handles of the regions that this engine lets the service move."""
        handles = self._running.handles
        match self._kind.moves:
            case Moves.ANY:
                return set(handles)
            case Moves.OWN_GROWTH:
                return {handles[entry] for entry in full}
            case Moves.NONE:
                return set()

    # Doing what the answer says

    def _give_back(self, seq: int, results: Iterable[Result]) -> None:
        for run, result in zip(self._ended, results, strict=True):
            if result != Freed():
                raise EngineError(f"a free of a live region was answered with {result}")
            self._device.vacate(seq, run.start_token, run.tokens)
        self._ended = []

    def _grow(self, answer: Answer, results: Iterable[Result], full: Iterable[int]) -> set[int]:
        """Note where regions lie now, and return the handles of those to preempt."""
        running, places, victims = self._running, list(answer.moved), set()
        for entry, result in zip(full, results, strict=True):
            if isinstance(result, Place):
                places.append(result)
            elif isinstance(result, Refusal):
                victims.add(self._victim(running.handles[entry], result))
        moves = [
            running.place(running.entry(p.handle), p.start_token, p.length_tokens) for p in places
        ]
        self._device.move(answer.seq, [move for move in moves if move])
        if places and self._blocked is Reason.FRAGMENTED:
            self._blocked = None
        return victims - {NOBODY}

    def _victim(self, handle: int, refusal: Refusal) -> int:
        """Return the region to preempt for one that cannot grow, or NOBODY to wait."""
        if self._refused(refusal) not in PREEMPT:
            return NOBODY
        if self._running.count == 1 and not refusal.awaiting_completion_tokens:
            return handle  # alone and at the end of the memory: it has to start elsewhere
        return refusal.preempt_handle

    def _admit(self, asked: Sequence[Request], results: Iterable[Result]) -> None:
        refused: list[Request] = []
        blocked: Reason | None = None
        for request, result in zip(asked, results, strict=True):
            self._queue.popleft()
            if isinstance(result, Place):
                self._running.add(request, *result)
                self._passed = self._passed + 1 if refused else 0
            elif isinstance(result, Refusal):
                refused.append(request)
                reason = self._refused(result)
                passing = reason in ASK_AGAIN or result.awaiting_completion_tokens
                if not (blocked or passing or reason is Reason.SKIPPED):
                    blocked = reason
        self._queue.extendleft(reversed(refused))
        if asked:
            self._blocked = blocked

    def _refused(self, refusal: Refusal) -> Reason:
        reason = refusal.reason
        if reason in BUGS:
            raise EngineError(f"refused as {reason.name}: {refusal.field}")
        if reason is not Reason.SKIPPED:
            self.tally.refusals += 1
            self._last_refusal = reason.name
        return reason

    def _preempt(self, handles: Iterable[int]) -> None:
        """Send these requests back to the front of the queue."""
        victims = []
        for handle in handles:
            entry = self._running.entry(handle)
            oldest = self._running.births[entry] == self._running.births.min()
            if oldest and self._running.count > 1:
                raise EngineError("the oldest request was named for preemption")
            request = self._running.requests[entry]
            self._generated[request.number] = self._end(entry, End.PREEMPTED)
            victims.append(request)
        self._queue.extendleft(sorted(victims, reverse=True))
        self.tally.preempted += len(victims)

    # The step

    def _decode(self) -> None:
        """Write a token of each request that has room, and the prompts of the admitted."""
        running = self._running
        ready = np.flatnonzero((running.written > 0) & (running.written < running.lengths))
        admitted = np.flatnonzero(running.written == 0).tolist()
        self._device.append(running.numbers[ready], running.starts[ready], running.written[ready])
        running.written[ready] += 1
        for entry in admitted:
            request = running.requests[entry]
            tokens = request.prompt_tokens + self._generated.get(request.number, 0)
            self._device.fill(request.number, int(running.starts[entry]), tokens)
            running.written[entry] = tokens
        if ready.size:
            self.tally.tokens_generated += ready.size
            self._progress_step = self.tally.steps

    def _measure(self) -> None:
        self._window_closed |= self.tally.refusals > 0 and not self._queue
        if self.tally.refusals == 0 or self._window_closed:
            return
        written, reserved = int(self._running.written.sum()), int(self._running.lengths.sum())
        self.tally.window_steps += 1
        self.tally.written_over_capacity += written / self._pool.response.capacity_tokens
        self.tally.written_over_reserved += written / reserved if reserved else 1.0

    def _retire(self) -> None:
        """Let go of the requests that have reached their end."""
        done = np.flatnonzero(self._running.written == self._running.totals)
        for entry in done[::-1].tolist():
            limited = self._running.requests[entry].limited
            self._end(entry, End.HIT_LIMIT if limited else End.FINISHED)
            self.tally.hit_limit += limited
            self.tally.finished += 1

    def _end(self, entry: int, end: End) -> int:
        """Stop running a request, and return what was generated for it."""
        running = self._running
        request, written = running.requests[entry], int(running.written[entry])
        output_tokens = written - request.prompt_tokens
        run = _Ended(
            running.handles[entry], end, output_tokens, int(running.starts[entry]), written
        )
        self._ended.append(run)
        running.remove(entry)
        return output_tokens
