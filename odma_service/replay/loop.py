"""The loop: continuous batching, over any memory; of each tenant first come first served.

    give back what has ended, grow what is full, admit from the queue      one decision
    copy; prefill the admitted; a token of every request that has room     the step

Nothing has to be decided in most steps: the next event is the earliest of a region full, a
request finished and an arrival that could be admitted. In the closed loop all arrive at once;
in the open one, and where requests wait for answers, when they come. The steps before it
are taken at once. A preempted request goes back to the front of the queue with what it had
generated, and its next prefill computes that again; or, where preempted ones are swapped, all
that it had written is copied to the host and back.

With `overtake` so many of those behind a request that waits for room may pass it, where the
memory can look for room behind a refusal; after 64 have, all wait for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, merge
from itertools import islice
from typing import NamedTuple

from odma_service.errors import OdmaError
from odma_service.replay.load import Load
from odma_service.replay.memory import Asked, Decision, Ended, Memory, Run, Step
from odma_service.replay.prices import PICOSECONDS, Prices
from odma_service.values import End

ADMISSIONS = 8  # of a tenant asked for in one step: after a refusal the rest would be skipped
MOST_PASSED = 64
PATIENCE_STEPS = 1_000


class StuckError(OdmaError):
    """Nothing moves any more: the policy neither grows, nor admits, nor preempts."""


class Sums(NamedTuple):
    """What has come together by some moment: time, tokens, and integrals over time."""

    now_ps: int = 0
    tokens: int = 0
    written_token_ps: int = 0
    reserved_token_ps: int = 0
    copy_ps: int = 0
    prefill_ps: int = 0
    running_ps: int = 0


@dataclass(slots=True)
class History:
    """A run of the loop.

    sums        one entry for each request that finished, in that order
    finished    their numbers
    arrived_ps  by request: when it came; where all arrive at once, to the queue's head
    first_ps    by request: its first token
    finished_ps by request
    emptied     how many had finished when nobody was waiting, or would come, for the first time
    """

    arrived_ps: list[int]
    first_ps: list[int]
    finished_ps: list[int]
    sums: list[Sums] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    emptied: int | None = None
    steps: int = 0
    decisions: int = 0
    preempted: list[int] = field(default_factory=list)  # their numbers
    recomputed_tokens: int = 0
    swapped_tokens: int = 0  # out and in
    prompt_tokens: int = 0  # of those let in, with what they had generated; not of the swapped
    reused_tokens: int = 0  # of these: not prefilled
    copies: int = 0
    copied_tokens: int = 0

    @property
    def preemptions(self) -> int:
        """How many there were."""
        return len(self.preempted)


class Queue:
    """Who waits: a line for each tenant, and how many have passed the head of it."""

    def __init__(self, load: Load, overtake: int) -> None:
        self._requests = load.requests
        self._lines: dict[str, deque[int]] = {r.tenant: deque() for r in load.requests}
        self._passed = dict.fromkeys(self._lines, 0)
        self._most = max(ADMISSIONS, 1 + overtake)
        self.is_shared = len(self._lines) > 1

    def __len__(self) -> int:
        """Return how many wait."""
        return sum(map(len, self._lines.values()))

    def line(self, number: int) -> deque[int]:
        """Return the line that a request stands in."""
        return self._lines[self._requests[number].tenant]

    def heads(self) -> Iterator[int]:
        """Return those who may ask: the first of each line, the earliest of two heads first."""
        most = {tenant: self._most if n < MOST_PASSED else 1 for tenant, n in self._passed.items()}
        return merge(*(islice(line, most[tenant]) for tenant, line in self._lines.items()))

    def take(self, number: int) -> int | None:
        """Take a request out of its line, and return who is at the head of that now."""
        tenant = self._requests[number].tenant
        line = self._lines[tenant]
        self._passed[tenant] = 0 if line[0] == number else self._passed[tenant] + 1
        line.remove(number)
        return line[0] if line else None


def serve(
    load: Load,
    memory: Memory,
    prices: Prices,
    *,
    batch_cap: int = 256,
    closed: bool = True,
    overtake: int = 0,
    watch: Callable[[int], None] | None = None,
) -> History:
    """Serve every request of the load to its end; `watch` is told how many have finished."""
    loop = Loop(load, memory, prices, batch_cap, closed=closed, overtake=overtake)
    told = 0
    while loop.advance():
        if watch is not None and len(loop.history.finished) - told >= 64:
            told = len(loop.history.finished)
            watch(told)
    return loop.history


class Loop:
    """The state of one engine between two decisions."""

    def __init__(
        self,
        load: Load,
        memory: Memory,
        prices: Prices,
        batch_cap: int,
        *,
        closed: bool = True,
        overtake: int = 0,
    ) -> None:
        count = len(load)
        self.history = History([-1] * count, [-1] * count, [-1] * count)
        self._load = load
        self._memory = memory
        self._prices = prices
        self._cap = batch_cap
        self._closed = closed and not load.after  # all arrive at once
        self._overtakes = overtake > 0
        self._queue = Queue(load, overtake)
        self._coming = arrivals(load, closed=self._closed)
        self._to_come = count
        self._followers = followers(load)
        self._generated: dict[int, int] = {}
        self._running: dict[int, Run] = {}
        self._heap: list[tuple[int, int, Run]] = []
        self._ended: list[Ended] = []
        self._stalled: list[Run] = []  # refused room
        self._filled: list[Run] = []  # full since the last step
        self._blocked = False
        self._births = 0
        self._tick = 0
        self._written = 0  # of the running, as the reserved
        self._reserved = 0
        self._unread = 0
        self._sums = Sums()
        self._idle_steps = 0

    def advance(self) -> bool:
        """Decide, and take steps up to the next event; False when all is done."""
        self._arrive()
        if not self._running and not self._queue:
            if not self._to_come:
                return False
            self._sums = self._sums._replace(now_ps=self._coming[0][0])
            self._arrive()
        prefill_ps = copy_ps = 0
        fresh: list[Run] = []
        full = self._full()
        asked = self._asked(deciding=bool(full))
        if self._ended or full or asked:
            swapped = self.history.swapped_tokens
            decision = self._decide(full, asked)
            copy_ps = self._prices.copies_ps(decision.copies, decision.copied_tokens)
            fresh, prefill_ps = self._admit(decision, asked)
            moved = self.history.swapped_tokens - swapped
            copy_ps += moved * self._prices.swapped_token_ps
        self._note_empty()
        waits = bool(self._stalled or fresh or (self._queue and not self._blocked and self._room()))
        steps = 1 if waits or not self._running else self._quiet_steps(copy_ps)
        self._take_steps(steps, prefill_ps, copy_ps)
        for run in fresh:
            if self.history.first_ps[run.number] < 0:
                self.history.first_ps[run.number] = self._sums.now_ps
        self._retire()
        return True

    def give_back(self) -> None:
        """Give back what the last to end had, when all is done."""
        if self._ended:
            self._ask([], [])

    # What there is to decide

    def _arrive(self) -> None:
        coming, arrived = self._coming, self.history.arrived_ps
        while coming and coming[0][0] <= self._sums.now_ps:
            at_ps, number = heappop(coming)
            line = self._queue.line(number)
            if not (self._closed and line):
                arrived[number] = at_ps
            line.append(number)
            self._to_come -= 1
            self._blocked &= not self._overtakes

    def _full(self) -> list[Run]:
        """Return the runs without room for a token, the oldest first."""
        full = sorted(self._stalled + self._filled, key=_birth)
        self._stalled, self._filled = [], []
        return full

    def _asked(self, *, deciding: bool) -> list[Asked]:
        """Return who asks. Where tenants share, in every batch: a claim has to be renewed."""
        if self._ended:
            self._blocked = False
        if not self._queue or (self._blocked and not (deciding and self._queue.is_shared)):
            return []
        room = self._room()
        return [
            Asked(number, self._load.requests[number], self._generated.get(number, 0))
            for number in islice(self._queue.heads(), room)
        ]

    def _room(self) -> int:
        return self._cap - len(self._running)

    # Deciding

    def _decide(self, full: list[Run], asked: list[Asked]) -> Decision:
        history = self.history
        reserved = sum(run.room for run in full)
        decision = self._ask(full, asked)
        self._reserved += sum(run.room for run in full) - reserved
        self._stalled = decision.stalled
        self._unread = decision.unread_tokens
        if decision.victims:
            self._preempt(decision.victims)
        if len(full) > len(self._stalled):
            still = set(self._stalled)
            for run in full:
                if run not in still and run.birth in self._running:
                    self._schedule(run)
        history.decisions += 1
        history.copies += decision.copies
        history.copied_tokens += decision.copied_tokens
        admitted = sum(placed is not None for placed in decision.placed)
        others = self._overtakes and admitted > 0  # come within reach of the head of the queue
        self._blocked = admitted < len(asked) and not (
            decision.again or decision.copies or decision.victims or others
        )
        return decision

    def _ask(self, full: list[Run], asked: list[Asked]) -> Decision:
        steps, ended, running = self.history.steps, self._ended, self._running
        step = Step(steps, self._tick, ended, full, asked, running, self._overtakes)
        self._ended = []
        return self._memory.decide(step)

    def _preempt(self, victims: list[Run]) -> None:
        """Send these back to the front of the queue, the oldest first in it."""
        for run in sorted(victims, key=_birth, reverse=True):
            written = run.lead + self._tick
            generated = written - run.request.prompt_tokens
            self._remove(run)
            self._ended.append(Ended(run, End.PREEMPTED, generated))
            self._generated[run.number] = generated
            self._queue.line(run.number).appendleft(run.number)
            self.history.preempted.append(run.number)
            if self._prices.swapped_token_ps:
                self.history.swapped_tokens += written
            else:
                self.history.recomputed_tokens += written
        self._stalled = [run for run in self._stalled if run.birth in self._running]

    def _admit(self, decision: Decision, asked: list[Asked]) -> tuple[list[Run], int]:
        """Return who was let in, and how long their prefill takes."""
        fresh, prefill_ps = [], 0
        arrived, prices = self.history.arrived_ps, self._prices
        for placed, (number, request, generated) in zip(decision.placed, asked, strict=False):
            if placed is None:
                continue
            handle, room, reused = placed
            held = request.prompt_tokens + generated
            if prices.swapped_token_ps and number in self._generated:
                self.history.swapped_tokens += held
            else:
                prefill_ps += prices.prefill_ps(held) - prices.prefill_ps(reused)
                self.history.prompt_tokens += held
                self.history.reused_tokens += reused
            self._births += 1
            run = Run(number, request, self._births)
            run.handle, run.room = handle, room
            run.lead = held - self._tick
            self._running[run.birth] = run
            self._written += held
            self._reserved += room
            self._schedule(run)
            fresh.append(run)
            head = self._queue.take(number)
            for came in (number, head) if self._closed else ():
                if came is not None and arrived[came] < 0:
                    arrived[came] = self._sums.now_ps
        return fresh, prefill_ps

    def _schedule(self, run: Run) -> None:
        total, room = run.request.total_tokens, run.room
        run.due = min(total, room) - run.lead
        heappush(self._heap, (run.due, run.birth, run))

    # The step

    def _note_empty(self) -> None:
        if self.history.emptied is None and not self._queue and not self._to_come:
            self.history.emptied = len(self.history.finished)

    def _quiet_steps(self, copy_ps: int) -> int:
        """Return how many steps, copies before the first, there are before a decision."""
        heap = self._heap
        while heap[0][0] != heap[0][2].due:
            heappop(heap)
        steps = heap[0][0] - self._tick
        if (self._overtakes or not self._queue) and self._coming and self._room():
            wait_ps = self._coming[0][0] - self._sums.now_ps - copy_ps
            steps = self._prices.steps_until(
                len(self._running), self._written, steps, wait_ps, self._unread
            )
        return steps

    def _take_steps(self, steps: int, prefill_ps: int, copy_ps: int) -> None:
        running = len(self._running) - len(self._stalled)
        idle = sum(run.lead + self._tick for run in self._stalled)
        decode = self._prices.decode(running, self._written - idle, steps, self._unread)
        apart_ps = prefill_ps + copy_ps
        ps = decode.ps + apart_ps
        sums = self._sums
        self._sums = Sums(
            sums.now_ps + ps,
            sums.tokens + running * steps,
            sums.written_token_ps + decode.token_ps + idle * decode.ps + self._written * apart_ps,
            sums.reserved_token_ps + self._reserved * ps,
            sums.copy_ps + copy_ps,
            sums.prefill_ps + prefill_ps,
            sums.running_ps + running * ps,
        )
        self._tick += steps
        self._written += running * steps
        self.history.steps += steps
        for run in self._stalled:
            run.lead -= steps
        self._idle_steps = 0 if running else self._idle_steps + 1
        if self._idle_steps >= PATIENCE_STEPS:
            raise StuckError(
                f"no token in {PATIENCE_STEPS} steps: {len(self._stalled)} requests running,"
                f" {len(self._queue)} waiting"
            )

    def _retire(self) -> None:
        """Let go of the requests that have reached their end."""
        heap, tick, history = self._heap, self._tick, self.history
        while heap and heap[0][0] <= tick:
            due, _, run = heappop(heap)
            if due != run.due:
                continue
            if run.lead + tick < run.request.total_tokens:
                self._filled.append(run)
                continue
            self._remove(run)
            request = run.request
            end = End.HIT_LIMIT if request.limited else End.FINISHED
            self._ended.append(Ended(run, end, request.output_tokens))
            history.finished.append(run.number)
            history.sums.append(self._sums)
            history.finished_ps[run.number] = self._sums.now_ps
            for follower, gap_ps in self._followers.get(run.number, ()):
                heappush(self._coming, (self._sums.now_ps + gap_ps, follower))

    def _remove(self, run: Run) -> None:
        del self._running[run.birth]
        run.due = -1
        self._written -= run.lead + self._tick
        self._reserved -= run.room


def arrivals(load: Load, *, closed: bool) -> list[tuple[int, int]]:
    """Return when who comes who waits for nobody's answer, as a heap of picoseconds."""
    coming = [
        (0 if closed else round(seconds * PICOSECONDS), number)
        for number, seconds in enumerate(load.arrivals_seconds)
        if not load.after or load.after[number] < 0
    ]
    heapify(coming)
    return coming


def followers(load: Load) -> dict[int, list[tuple[int, int]]]:
    """Return by request who waits for its answer, and how long after it he comes."""
    waiting: dict[int, list[tuple[int, int]]] = {}
    for number, (after, gap) in enumerate(zip(load.after, load.gaps_seconds, strict=True)):
        if after >= 0:
            waiting.setdefault(after, []).append((number, round(gap * PICOSECONDS)))
    return waiting


def _birth(run: Run) -> int:
    return run.birth
