"""Paging with a prefix cache: what reuse gives, where a trace tells which prompts begin alike.

Whole blocks of tokens (512, or what the trace says) are shared by all whose prompts have them,
and stay when nobody has them any more until their pages are needed (the least recently used
goes first). Those of answers stay as well, where the trace knows them. What is cached is not
prefilled. A block counts as cached from the step in which it is first admitted.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

from odma_service.errors import InvalidError
from odma_service.replay.load import Request
from odma_service.replay.memory import Decision, Placed, Run, Step
from odma_service.replay.rivals.paging import PagedMemory
from odma_service.traces.trace import PREFIX_TOKENS


class PrefixMemory(PagedMemory):
    """A pool in pages, with shared blocks, which some kernels read once a step for all."""

    def __init__(
        self,
        capacity_tokens: int,
        page_tokens: int,
        headroom_share: float,
        kv_bandwidth_share: float = 1.0,
        block_tokens: int = PREFIX_TOKENS,
        *,
        reads_once: bool = False,
    ) -> None:
        super().__init__(capacity_tokens, page_tokens, headroom_share, kv_bandwidth_share)
        if block_tokens % page_tokens:
            raise InvalidError(
                "hash_ids", f"blocks of whole pages of {page_tokens} tokens, not of {block_tokens}"
            )
        self._block_tokens = block_tokens
        self._block_pages = block_tokens // page_tokens
        self._reads_once = reads_once
        self._users: Counter[int] = Counter()  # of blocks that somebody has
        self._idle: OrderedDict[int, None] = OrderedDict()  # blocks that nobody has
        self._blocks: dict[int, list[int]] = {}  # by handle
        self._again = 0  # blocks that running ones have, each but once

    def decide(self, step: Step) -> Decision:
        """Give back, grow and admit, in this order."""
        decision = super().decide(step)
        decision.unread_tokens = self._again * self._block_tokens * self._reads_once
        return decision

    def _take(self, pages: int) -> bool:
        while self._free < pages and self._idle:
            self._idle.popitem(last=False)
            self._free += self._block_pages
        return super()._take(pages)

    def _release(self, run: Run, written_tokens: int) -> None:
        held = set(self._blocks.pop(run.handle))
        self._free += run.room // self._page_tokens - len(held) * self._block_pages
        # The end of a prefix goes before its beginning.
        for block in reversed(self._whole(run.request, written_tokens)):
            self._users[block] -= block in held
            if self._users[block]:
                self._again -= block in held
                continue
            del self._users[block]
            if block not in held and block not in self._idle:
                self._free -= self._block_pages
            self._idle[block] = None
            self._idle.move_to_end(block)

    def _whole(self, request: Request, tokens: int) -> list[int]:
        """Return the blocks that so many of a request's tokens fill."""
        return list(dict.fromkeys(request.block_ids[: tokens // self._block_tokens]))

    def _admit(self, step: Step, decision: Decision) -> None:
        alone = not step.running
        for _, request, generated_tokens in step.asked:
            held = request.prompt_tokens + generated_tokens
            pages = -(-(held + 1) // self._page_tokens)
            blocks = self._whole(request, held)
            cached = 0
            while cached < len(blocks) and (
                blocks[cached] in self._users or blocks[cached] in self._idle
            ):
                cached += 1
            woken = [block for block in blocks if block in self._idle]
            in_use = sum(block in self._users for block in blocks)
            needed = pages - (in_use + len(woken)) * self._block_pages
            room = self._free + (len(self._idle) - len(woken)) * self._block_pages
            if room - needed < (0 if alone else self._headroom):
                return
            alone = False
            for block in woken:
                del self._idle[block]
            self._users.update(blocks)
            self._again += in_use
            self._take(needed)
            self._handles += 1
            self._blocks[self._handles] = blocks
            known = min(cached * self._block_tokens, held - 1)
            decision.placed.append(Placed(self._handles, pages * self._page_tokens, known))
