"""Paging with a prefix cache: what reuse gives, where a trace tells which prompts begin alike.

Whole blocks of prompt tokens (512, or what the trace says) are shared by all who have them, and
stay when nobody has them any more until their pages are needed (the least recently used goes
first). What is cached is not prefilled. A block counts as cached from the step in which it is
first admitted.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

from odma_service.errors import InvalidError
from odma_service.replay.memory import Decision, Placed, Run, Step
from odma_service.replay.rivals.paging import PagedMemory
from odma_service.traces.trace import PREFIX_TOKENS


class PrefixMemory(PagedMemory):
    """A pool in pages, with shared blocks of prompts."""

    def __init__(
        self,
        capacity_tokens: int,
        page_tokens: int,
        headroom_share: float,
        kv_bandwidth_share: float = 1.0,
        block_tokens: int = PREFIX_TOKENS,
    ) -> None:
        super().__init__(capacity_tokens, page_tokens, headroom_share, kv_bandwidth_share)
        if block_tokens % page_tokens:
            raise InvalidError(
                "hash_ids", f"blocks of whole pages of {page_tokens} tokens, not of {block_tokens}"
            )
        self._block_tokens = block_tokens
        self._block_pages = block_tokens // page_tokens
        self._users: Counter[int] = Counter()  # of blocks that somebody has
        self._idle: OrderedDict[int, None] = OrderedDict()  # blocks that nobody has
        self._blocks: dict[int, tuple[int, ...]] = {}  # by handle

    def _take(self, pages: int) -> bool:
        while self._free < pages and self._idle:
            self._idle.popitem(last=False)
            self._free += self._block_pages
        return super()._take(pages)

    def _release(self, run: Run) -> None:
        blocks = self._blocks.pop(run.handle)
        self._free += run.room // self._page_tokens - len(blocks) * self._block_pages
        for block in reversed(blocks):  # the end of a prefix goes before its beginning
            self._users[block] -= 1
            if not self._users[block]:
                del self._users[block]
                self._idle[block] = None

    def _admit(self, step: Step, decision: Decision) -> None:
        alone = not step.running
        for asked in step.asked:
            request = asked.request
            held = request.prompt_tokens + asked.generated_tokens + 1
            pages = -(-held // self._page_tokens)
            blocks = tuple(
                dict.fromkeys(request.prefix_ids[: request.prompt_tokens // self._block_tokens])
            )
            cached = 0
            while cached < len(blocks) and (
                blocks[cached] in self._users or blocks[cached] in self._idle
            ):
                cached += 1
            woken = [block for block in blocks if block in self._idle]
            shared = sum(block in self._users for block in blocks) + len(woken)
            needed = pages - shared * self._block_pages
            room = self._free + (len(self._idle) - len(woken)) * self._block_pages
            if room - needed < (0 if alone else self._headroom):
                return
            alone = False
            for block in woken:
                del self._idle[block]
            self._users.update(blocks)
            self._take(needed)
            self._handles += 1
            self._blocks[self._handles] = blocks
            known = min(cached * self._block_tokens, request.prompt_tokens - 1)
            decision.placed.append(Placed(self._handles, pages * self._page_tokens, known))
