"""Extents: the rival between one region and pages, at most k runs for each request.

Kernels that follow a handful of runs need no block table, and long runs are read at full
bandwidth. Growth takes what lies behind the last run, else a piece of the longest hole, else
copies the request into one run; else the youngest is preempted. Nobody else moves.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort

from odma_service.replay.load import BLOCK_TOKENS
from odma_service.replay.memory import Decision, Placed, Run, Step
from odma_service.values import End

Extent = tuple[int, int]  # start and length in blocks


class ExtentMemory:
    """A pool in blocks of 16 tokens. Requests hold runs of them, `most` at the most."""

    def __init__(
        self, capacity_tokens: int, most: int, step_tokens: int, headroom_share: float
    ) -> None:
        blocks = capacity_tokens // BLOCK_TOKENS
        self._most = most
        self._step = -(-step_tokens // BLOCK_TOKENS)
        self._headroom = math.ceil(blocks * headroom_share)
        self._holes: list[Extent] = [(0, blocks)]
        self._held: dict[int, list[Extent]] = {}
        self._handles = 0

    @property
    def kv_bandwidth_share(self) -> float:
        """Runs are long."""
        return 1.0

    def decide(self, step: Step) -> Decision:
        """Give back, grow and admit, in this order."""
        decision = Decision()
        for run, end, _ in step.ended:
            if end is not End.PREEMPTED:
                self._release(run)
        self._grow_all(step, decision)
        if not decision.victims:
            self._admit(step, decision)
        return decision

    def _grow_all(self, step: Step, decision: Decision) -> None:
        youngest_last = list(step.running.values())
        preempted: set[Run] = set()
        for run in step.full:
            while run not in preempted and not self._grow(run, run.lead + step.tick, decision):
                victim = youngest_last.pop()
                preempted.add(victim)
                self._release(victim)
        decision.victims.extend(preempted)

    def _grow(self, run: Run, used_tokens: int, decision: Decision) -> bool:
        """Give a run that is full up to a step more."""
        held = self._held[run.handle]
        start, length = held[-1]
        behind = next((hole for hole in self._holes if hole[0] == start + length), None)
        if behind is not None:
            more = self._take(behind, self._step)
            held[-1] = start, length + more[1]
        elif len(held) < self._most and self._holes:
            more = self._take(max(self._holes, key=_length), self._step)
            held.append(more)
        else:
            blocks = run.room // BLOCK_TOKENS
            hole = self._best_fit(blocks + 1)
            if hole is None:
                return False
            whole = self._take(hole, blocks + self._step)
            decision.copies += len(held)
            decision.copied_tokens += used_tokens
            self._release(run)
            self._held[run.handle] = [whole]
            more = 0, whole[1] - blocks
        run.room += more[1] * BLOCK_TOKENS
        return True

    def _admit(self, step: Step, decision: Decision) -> None:
        alone = not step.running
        for asked in step.asked:
            tokens = asked.request.prompt_tokens + asked.generated_tokens + 1
            need = -(-tokens // BLOCK_TOKENS)
            free = sum(map(_length, self._holes))
            if free - need < (0 if alone else self._headroom):
                return
            hole = self._best_fit(need)
            longest = sorted(self._holes, key=_length, reverse=True)[: self._most]
            if hole is None and sum(map(_length, longest)) < need:
                return
            alone = False
            held, left = [], need
            for each in longest if hole is None else [hole]:
                held.append(self._take(each, left))
                left -= held[-1][1]
                if left == 0:
                    break
            self._handles += 1
            self._held[self._handles] = held
            decision.placed.append(Placed(self._handles, need * BLOCK_TOKENS))

    # holes, in address order, none beside another

    def _best_fit(self, blocks: int) -> Extent | None:
        return min((hole for hole in self._holes if hole[1] >= blocks), key=_length, default=None)

    def _take(self, hole: Extent, blocks: int) -> Extent:
        """Take the front of a hole, at most all of it."""
        start, length = hole
        taken = min(blocks, length)
        index = bisect_left(self._holes, hole)
        self._holes[index : index + 1] = [(start + taken, length - taken)] * (taken < length)
        return start, taken

    def _release(self, run: Run) -> None:
        for start, length in self._held.pop(run.handle):
            index = bisect_left(self._holes, (start, 0))
            first, end = start, start + length
            if index < len(self._holes) and self._holes[index][0] == end:
                end += self._holes.pop(index)[1]
            if index > 0 and sum(self._holes[index - 1]) == first:
                first = self._holes.pop(index - 1)[0]
            insort(self._holes, (first, end - first))


def _length(extent: Extent) -> int:
    return extent[1]
