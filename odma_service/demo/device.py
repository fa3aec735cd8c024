"""A device memory that can tell whether its tokens are where the books say.

Two arrays hold one number a token. `memory` is what writes and copies have made of it;
`books` is what the answers promise: the id of the token that should lie there, or FREE.
Copies touch the memory only and places the books only, so a wrong or missing copy shows
as a difference between the two.

With several streams the device is as unruly as an engine with several streams may be: an
answer's copies end in the reverse of their order, and what was vacated is still being read
until the completion of the answer that vacated it is reported, so it must stay as it was; and
so must what was copied from.

A token that requests have in common has one id, and may lie where several of them read it. The
memory of what ended stays as it is until somebody writes there, whoever keeps it or gives it up:
what is reused is promised, never written, so it shows whether it is still what it was.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from odma_service.values import Copy

FREE = -1
REQUEST_SHIFT = 28  # positions stay below 2^28, the largest capacity of a pool
FIRST_BLOCK = 2**30  # numbers of blocks that requests have in common lie above those of requests

Ids = NDArray[np.int64]

NO_BLOCKS = np.zeros(0, np.int64), 1


class Move(NamedTuple):
    """Written tokens of a request, from `first` on, that lie elsewhere now."""

    request: int
    from_token: int
    to_token: int
    tokens: int
    first: int = 0


class _Vacated(NamedTuple):
    """A run that enqueued work may still read, and what it must find there."""

    seq: int
    start_token: int
    ids: Ids


class Device:
    """The memory of one pool. `violations` counts what was not as promised."""

    def __init__(
        self, capacity_tokens: int, *, ordered: bool, may_overlap: bool, drop_copy: int = 0
    ) -> None:
        """Make an empty memory; drop_copy is the number of a copy to leave out, from 1."""
        self.violations = 0
        self.tokens_checked = 0
        self.copies = 0
        self.copied_tokens = 0
        self._ordered = ordered
        self._may_overlap = may_overlap
        self._drop_copy = drop_copy
        self._memory = np.full(capacity_tokens, FREE, np.int64)
        self._books = np.full(capacity_tokens, FREE, np.int64)
        self._live = np.zeros(capacity_tokens, np.int32)  # so many requests have it
        self._blocks: dict[int, int] = {}  # numbers of what requests have in common, by id
        self._begins: dict[int, tuple[Ids, int]] = {}  # by request: numbers, and tokens of each
        self._wrong = np.zeros(capacity_tokens, np.bool_)
        self._positions = np.arange(capacity_tokens)
        self._vacated: list[_Vacated] = []

    def write(self, request: int, start_token: int, written: int, until: int) -> None:
        """Write tokens [written, until) of a request that starts there, over no live token."""
        run = slice(start_token + written, start_token + until)
        self.violations += int(np.count_nonzero(self._live[run]))
        self._memory[run] = self._enter(request, run, written)

    def begin(self, request: int, block_ids: Sequence[int], block_tokens: int) -> None:
        """Take a request's first tokens for those of these blocks, whosever they are."""
        numbers = [self._blocks.setdefault(id_, len(self._blocks)) for id_ in block_ids]
        self._begins[request] = np.array(numbers, np.int64) + FIRST_BLOCK, block_tokens

    def promise(self, request: int, start_token: int, first: int, tokens: int) -> None:
        """Enter in the books that so many tokens of a request from `first` on lie there already."""
        run = slice(start_token, start_token + tokens)
        others = np.where(self._live[run], self._books[run], FREE)
        ids = self._enter(request, run, first)
        self.violations += int(np.count_nonzero((others != FREE) & (others != ids)))

    def run(self, seq: int, copies: Sequence[Copy], movable: Container[int]) -> None:
        """Execute the copies of answer `seq`; only regions with these handles may move."""
        numbered = list(enumerate(copies, self.copies + 1))
        for number, copy in numbered if self._ordered else reversed(numbered):
            shared = abs(copy.from_token - copy.to_token) < copy.tokens
            if shared != copy.overlaps or (shared and not self._may_overlap):
                self.violations += 1
            if copy.handle not in movable:
                self.violations += 1
            if max(copy.from_token, copy.to_token) + copy.tokens > self._memory.size:
                self.violations += 1
            elif number != self._drop_copy:
                source = self._memory[copy.from_token : copy.from_token + copy.tokens]
                if not self._ordered:
                    self._vacated.append(_Vacated(seq, copy.from_token, source.copy()))
                self._memory[copy.to_token : copy.to_token + copy.tokens] = source
            self.copied_tokens += copy.tokens
        self.copies += len(numbered)

    def move(self, seq: int, moves: Sequence[Move]) -> None:
        """Enter in the books what answer `seq` has moved."""
        for move in moves:
            self.vacate(seq, move.from_token, move.tokens)
        for move in moves:
            self.promise(move.request, move.to_token, move.first, move.tokens)

    def vacate(self, seq: int, start_token: int, tokens: int) -> None:
        """Strike a run from the books: answer `seq` gave it back."""
        run = slice(start_token, start_token + tokens)
        if not self._ordered:
            self._vacated.append(_Vacated(seq, start_token, self._books[run].copy()))
        self._live[run] -= 1
        self._books[run][self._live[run] == 0] = FREE

    def complete(self, completed_seq: int) -> None:
        """Let go of the runs that no enqueued work can read any more."""
        self._vacated = [run for run in self._vacated if run.seq > completed_seq]

    def check_regions(self, starts: Ids, lengths: Ids) -> None:
        """Count regions that overlap another one or leave the memory."""
        order = np.argsort(starts)
        ends = (starts + lengths)[order]
        limits = np.append(starts[order][1:], self._memory.size)
        self.violations += int(np.count_nonzero(ends > limits[: ends.size]))

    def check(self) -> None:
        """Look at every live token, and at every vacated one that may still be read."""
        np.not_equal(self._memory, self._books, out=self._wrong)
        np.logical_and(self._wrong, self._live > 0, out=self._wrong)
        self.violations += int(np.count_nonzero(self._wrong))
        self.tokens_checked += int(np.count_nonzero(self._live))
        for run in self._vacated:
            now = self._memory[run.start_token : run.start_token + run.ids.size]
            self.violations += int(np.count_nonzero(now != run.ids))

    def _enter(self, request: int, run: slice, first: int = 0) -> Ids:
        positions = self._positions[first : first + run.stop - run.start]
        ids = positions + (request << REQUEST_SHIFT)
        blocks, block_tokens = self._begins.get(request, NO_BLOCKS)
        common = positions[: max(blocks.size * block_tokens - first, 0)]
        ids[: common.size] = common + (blocks[common // block_tokens] << REQUEST_SHIFT)
        self._books[run] = ids
        self._live[run] += 1
        return ids
