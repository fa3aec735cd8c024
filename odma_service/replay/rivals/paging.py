"""Paging: the rival that wastes nothing and needs a block table.

Pages are counted, not placed. Admission leaves some pages free (the headroom); growth takes a
page at a time and preempts the youngest request when there is none.
"""

from __future__ import annotations

import math

from odma_service.replay.memory import Decision, Placed, Run, Step
from odma_service.values import End

UNLIMITED_TOKENS = 2**40


class PagedMemory:
    """A pool in pages."""

    def __init__(
        self,
        capacity_tokens: int,
        page_tokens: int,
        headroom_share: float,
        kv_bandwidth_share: float = 1.0,
    ) -> None:
        pages = capacity_tokens // page_tokens
        self._page_tokens = page_tokens
        self._free = pages
        self._headroom = math.ceil(pages * headroom_share)
        self._handles = 0
        self._kv_bandwidth_share = kv_bandwidth_share

    @property
    def kv_bandwidth_share(self) -> float:
        """What pages let KV reads reach of the sequential bandwidth."""
        return self._kv_bandwidth_share

    def decide(self, step: Step) -> Decision:
        """Give back, grow and admit, in this order."""
        decision = Decision()
        for run, end, output_tokens in step.ended:
            if end is not End.PREEMPTED:
                self._release(run, run.request.prompt_tokens + output_tokens)
        self._grow(step, decision)
        if not decision.victims:
            self._admit(step, decision)
        return decision

    def _take(self, pages: int) -> bool:
        """Take free pages, if there are so many."""
        if self._free < pages:
            return False
        self._free -= pages
        return True

    def _release(self, run: Run, written_tokens: int) -> None:
        self._free += run.room // self._page_tokens

    def _grow(self, step: Step, decision: Decision) -> None:
        youngest_last = list(step.running.values())
        preempted: set[Run] = set()
        for run in step.full:
            if run in preempted:
                continue
            while run not in preempted and not self._take(1):
                victim = youngest_last.pop()
                preempted.add(victim)
                self._release(victim, victim.lead + step.tick)
            if run not in preempted:
                run.room += self._page_tokens
        decision.victims.extend(preempted)

    def _admit(self, step: Step, decision: Decision) -> None:
        alone = not step.running
        for asked in step.asked:
            held = asked.request.prompt_tokens + asked.generated_tokens + 1
            pages = -(-held // self._page_tokens)
            if self._free - pages < (0 if alone else self._headroom):
                return
            alone = False
            self._take(pages)
            self._handles += 1
            decision.placed.append(Placed(self._handles, pages * self._page_tokens))
