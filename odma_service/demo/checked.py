"""The memory of a pool, for the replay's loop, on a device that checks itself.

The loop takes all steps up to its next decision at once. What they wrote is written when that
decision comes, and every live token is looked at, also those that a request reuses; again after
the batch, if it moved anything.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from odma_service.demo.device import Device, Move
from odma_service.errors import OdmaError
from odma_service.pool.policy import PolicyRecord
from odma_service.replay.memory import Step
from odma_service.replay.pooled import EngineKind, PoolMemory, parts
from odma_service.traces.trace import PREFIX_TOKENS
from odma_service.values import Answer, Batch, Freed, Moves, Place, Reason, Refusal, Result

KEPT = 0
"""The handle of all kept runs in copies."""
BUGS = {Reason.INVALID, Reason.NOT_FOUND}


class BrokenAnswerError(OdmaError):
    """An answer breaks the contract."""


@dataclass(slots=True)
class Region:
    """A region as the last answer says, and how many tokens of which request are in it."""

    request: int
    place: Place
    written: int

    @property
    def base_token(self) -> int:
        """Where its first token would lie if its own memory began with it."""
        return self.place.start_token - self.place.shared_tokens

    @property
    def own(self) -> tuple[int, int]:
        """Where its own memory begins, and how long that is."""
        return self.place.start_token, self.place.length_tokens - self.place.shared_tokens

    @property
    def runs(self) -> list[tuple[int, int, int]]:
        """What is written in it: where, from which of its tokens on, and how many."""
        place, shared = self.place, self.place.shared_tokens
        runs = [(place.start_token, shared, self.written - shared)]
        return [(place.shared_start_token, 0, shared), *runs] if shared else runs


class CheckedMemory(PoolMemory):
    """A pool's owner. It counts refusals, the tokens that steps wrote, and how long calls took."""

    def __init__(
        self,
        device: Device,
        policy: PolicyRecord,
        kind: EngineKind,
        *,
        version: int,
        block_tokens: int = PREFIX_TOKENS,
    ) -> None:
        """Make one for a pool under version `version` of its policy."""
        super().__init__(policy, kind, block_tokens=block_tokens)
        self.refusals = 0
        self.tokens_generated = 0
        self.apply_ns: list[int] = []
        self._device = device
        self._version = version
        self._regions: dict[int, Region] = {}  # by handle

    def complete(self) -> None:
        """Say that all work is done; with several streams the pool waits for it."""
        if not self._kind.single_stream:
            self._seq = self._call(Batch(self._seq + 1, self._seq, [], [])).seq

    @abstractmethod
    def _call(self, batch: Batch) -> Answer:
        """Return the pool's answer."""

    def _apply(self, step: Step, batch: Batch) -> tuple[Answer, bool]:
        self._write_steps(step)
        self._device.check()
        started_ns = time.perf_counter_ns()
        answer = self._call(batch)
        self.apply_ns.append(time.perf_counter_ns() - started_ns)
        self._device.complete(batch.completed_seq)
        self._check_refusals(step, answer)
        freed, grown, asked = parts(step, answer.results)
        self._give_back(step, answer.seq, freed)
        self._device.run(answer.seq, answer.copies, self._movable(step, asked))
        places = [*answer.moved, *(result for result in grown if isinstance(result, Place))]
        moves = self._moves(places)
        self._device.move(answer.seq, moves)
        if answer.copies or moves:
            self._device.check()
        fresh = self._enter(step, asked)
        self._check_regions()
        for region, tokens in fresh:
            self._write(region, tokens)
        changed = answer.policy_version != self._version
        self._version = answer.policy_version
        return answer, changed

    # On the device

    def _write_steps(self, step: Step) -> None:
        """Write the tokens of all steps since the last decision."""
        held = {run.handle: run.lead + step.tick for run in step.running.values()}
        for run, _, output_tokens in step.ended:
            held[run.handle] = run.request.prompt_tokens + output_tokens
        for handle, region in self._regions.items():
            self.tokens_generated += held[handle] - region.written
            self._write(region, held[handle])

    def _write(self, region: Region, until: int) -> None:
        self._device.violations += until > region.place.length_tokens
        self._device.write(region.request, region.base_token, region.written, until)
        region.written = until

    def _check_regions(self) -> None:
        places = [region.own for region in self._regions.values()]
        starts, lengths = np.array(places, np.int64).reshape(-1, 2).T
        self._device.check_regions(starts, lengths)

    # What an answer says

    def _check_refusals(self, step: Step, answer: Answer) -> None:
        oldest = next((run.handle for run in step.running.values()), 0)
        for result in answer.results:
            if not isinstance(result, Refusal):
                continue
            if result.reason in BUGS:
                raise BrokenAnswerError(f"refused as {result.reason.name}: {result.field}")
            if oldest and result.preempt_handle == oldest and len(step.running) > 1:
                raise BrokenAnswerError("the oldest request was named for preemption")
            self.refusals += result.reason is not Reason.SKIPPED

    def _give_back(self, step: Step, seq: int, results: Sequence[Result]) -> None:
        for ended, result in zip(step.ended, results, strict=True):
            if result != Freed():
                raise BrokenAnswerError(f"a free of a live region was answered with {result}")
            region = self._regions.pop(ended.run.handle)
            for start, _, tokens in region.runs:
                self._device.vacate(seq, start, tokens)

    def _movable(self, step: Step, asked: Sequence[Result]) -> set[int]:
        """Return what copies may be of: what this engine lets the service move, what is gathered.

        Kept runs, which have no name, move where all may.
        """
        gathered = {result.handle for result in asked if isinstance(result, Place)}
        match self._kind.moves:
            case Moves.ANY:
                return gathered | {KEPT, *self._regions}
            case Moves.OWN_GROWTH:
                return gathered | {run.handle for run in step.full}
            case Moves.NONE:
                return gathered

    def _moves(self, places: Iterable[Place]) -> list[Move]:
        """Note where regions lie now, and return the moves of what is written in them."""
        moves = []
        for place in places:
            region = self._regions[place.handle]
            before = region.runs
            region.place = place
            for (old, first, tokens), (new, *_) in zip(before, region.runs, strict=True):
                if old != new:
                    moves.append(Move(region.request, old, new, tokens, first))
        return moves

    def _enter(self, step: Step, results: Sequence[Result]) -> list[tuple[Region, int]]:
        """Return the regions of new requests, and how long their prefill is."""
        fresh = []
        for (number, request, generated), result in zip(step.asked, results, strict=True):
            if isinstance(result, Place):
                self._device.begin(number, request.block_ids, self._block_tokens)
                region = Region(number, result, result.reused_tokens)
                self._regions[result.handle] = region
                for start, first, tokens in region.runs:
                    self._device.promise(number, start, first, tokens)
                fresh.append((region, request.prompt_tokens + generated))
        return fresh
