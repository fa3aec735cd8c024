"""What an engine that is never killed knows of its pool, and how books are held against it.

A twin is built from answers alone. So it cannot share an error with the books.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from odma_service.values import Allocate, Answer, Copy, Free, Op, Place, Refusal, Result


class Held(NamedTuple):
    """One live region."""

    request_id: str
    handle: int
    start_token: int
    length_tokens: int

    @property
    def end_token(self) -> int:
        """The first token behind it."""
        return self.start_token + self.length_tokens


def digest_of(words: Iterable[int]) -> int:
    """Return 64 bits of some words, as torture.c does: FNV-1a.

    >>> digest_of([]) == 0xCBF29CE484222325
    True
    """
    digest = 0xCBF29CE484222325
    for word in words:
        digest = ((digest ^ word) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return digest


class Outcome(NamedTuple):
    """An answer, without what a repeated one may have changed."""

    results: tuple[Result, ...]
    copies: tuple[Copy, ...]
    moved: tuple[Place, ...]

    @property
    def reused_tokens(self) -> int:
        """Tokens of its requests that need no prefill."""
        return sum(result.reused_tokens for result in self.results if isinstance(result, Place))

    def digest(self) -> int:
        """Return 64 bits of it, as torture.c does."""
        return digest_of(self._words())

    def _words(self) -> Iterable[int]:
        for result in self.results:
            if isinstance(result, Place):
                yield from result[:4]
            elif isinstance(result, Refusal):
                yield result.reason
                yield result.copy_tokens_needed
                yield result.preempt_handle
            else:
                yield result.already_free
        for copy in self.copies:
            yield from copy
        for place in self.moved:
            yield from place[:4]


class Twin:
    """The live regions of one pool, by handle. Replaced as a whole, never edited."""

    def __init__(self, held: dict[int, Held] | None = None) -> None:
        self.held = held or {}

    def after(self, ops: Sequence[Op], outcome: Outcome | Answer) -> Twin:
        """Return what is held once operations were answered so."""
        held = dict(self.held)
        for op, result in zip(ops, outcome.results, strict=True):
            if isinstance(op, Free):
                held.pop(op.handle, None)
            elif isinstance(result, Place) and result.length_tokens:
                name = op.request_id if isinstance(op, Allocate) else held[op.handle].request_id
                held[result.handle] = Held(name, *result[:3])
        for place in outcome.moved:
            held[place.handle] = Held(held[place.handle].request_id, *place[:3])
        return Twin(held)


@dataclass
class Findings:
    """What the books had wrong, and each thing in words."""

    lost: int = 0
    doubled: int = 0
    leaked: int = 0
    wrong_replays: int = 0
    words: list[str] = field(default_factory=list)

    def note(self, kind: str, what: str) -> None:
        """Count one thing of a kind."""
        setattr(self, kind, getattr(self, kind) + 1)
        self.words.append(f"{kind}: {what}")

    def compare(self, where: str, twin: Twin, live: Sequence[Held], held_tokens: int) -> None:
        """Hold the live regions of the books against the twin.

        `held_tokens` is all that the books call neither free nor waiting.
        """
        listed = {region.handle: region for region in live}
        for handle, region in twin.held.items():
            if listed.get(handle) != region:
                self.note("lost", f"{where}: {region} was acknowledged, is {listed.get(handle)}")
        for handle in listed.keys() - twin.held.keys():
            self.note("leaked", f"{where}: nobody holds {listed[handle]}")
        for first, second in pairwise(sorted(live, key=lambda region: region.start_token)):
            if first.end_token > second.start_token:
                self.note("doubled", f"{where}: {first} and {second} overlap")
        for name, count in Counter(region.request_id for region in live).items():
            if count > 1:
                self.note("doubled", f"{where}: {name} holds {count} regions")
        live_tokens = sum(region.length_tokens for region in live)
        if held_tokens != live_tokens:
            self.note("leaked", f"{where}: {held_tokens} tokens are held, {live_tokens} by regions")
