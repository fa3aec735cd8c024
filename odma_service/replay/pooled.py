"""A pool as a memory, wherever it is: what one decision asks of it, and what its answer means.

A decision is one batch: frees, extends and allocates, in this order. Who a region that cannot
grow preempts, and whether a refusal may be asked again at once, is read from the answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from odma_service.errors import InvalidError
from odma_service.replay.keys import MOST_BATCH_KEYS, MOST_KEYS, keys_of
from odma_service.replay.memory import Asked, Decision, Ended, Placed, Run, Step
from odma_service.traces.trace import PREFIX_TOKENS
from odma_service.values import (
    KEY_BYTES,
    Allocate,
    Answer,
    Batch,
    Extend,
    Free,
    Moves,
    Op,
    Overflow,
    Place,
    Reason,
    Refusal,
    Result,
    Start,
    Used,
)

if TYPE_CHECKING:
    from odma_service.pool.policy import PolicyRecord
    from odma_service.replay.load import Request

PREEMPT = {Reason.NO_SPACE, Reason.FRAGMENTED}
PASSING = {Reason.COPY_BUDGET, Reason.WAITS_FOR_COMPLETION, Reason.PINNED}


@dataclass(frozen=True, slots=True)
class EngineKind:
    """What the engine lets the pool move, on how many streams it runs, and what it reuses.

    Without granules it reuses nothing. With two runs it reads a beginning where it lies, once a
    step for all, which costs each of them the reading of second_run_tokens more.
    """

    moves: Moves = Moves.ANY
    single_stream: bool = True
    copies_may_overlap: bool = True
    granule_tokens: int = 0
    reads_two_runs: bool = False
    second_run_tokens: int = 0


class PoolMemory(ABC):
    """A pool that nobody else has used, under one policy."""

    max_ops = 1024  # of a batch

    def __init__(
        self,
        policy: PolicyRecord,
        kind: EngineKind,
        *,
        exact_lengths: bool = False,
        block_tokens: int = PREFIX_TOKENS,
    ) -> None:
        """Make one that asks for a policy's pool; block_tokens are those of block_ids."""
        self._kind = kind
        self._block_tokens = block_tokens
        self._sent: dict[int, int] = {}  # by handle: how many bytes of keys its Allocate had
        self._shared: dict[int, tuple[int, int]] = {}  # by handle: start and tokens
        self._asker_is_victim = policy.overflow is Overflow.PREEMPT
        self._predicts = policy.start is Start.QUANTILE
        self._exact = exact_lengths
        self._seq = 0
        self._answered_step = -2

    @property
    def kv_bandwidth_share(self) -> float:
        """Regions read as long runs."""
        return 1.0

    @abstractmethod
    def _apply(self, step: Step, batch: Batch) -> tuple[Answer, bool]:
        """Return the answer to a step's batch, and whether another policy is in force now."""

    def decide(self, step: Step) -> Decision:
        """Give back, grow and admit, in one batch; what has no room in it waits a step."""
        fitting = self._fitting(step)
        batch = self._batch(fitting)
        answer, changed = self._apply(fitting, batch)
        self._seq = answer.seq
        self._answered_step = step.number

        decision = Decision(
            stalled=step.full[len(fitting.full) :],
            again=changed or len(fitting.asked) < len(step.asked),
            copies=len(answer.copies),
            copied_tokens=sum(copy.tokens for copy in answer.copies),
        )
        _, grown, asked = parts(fitting, answer.results)
        self._grow(fitting, grown, decision)
        self._admit(fitting, asked, decision)
        self._note_reuse(batch, answer)
        decision.unread_tokens = self._unread(decision)
        # What has ended teaches from the next batch on, and shorter regions may fit then.
        decision.again |= self._predicts and bool(step.ended)
        return decision

    def _fitting(self, step: Step) -> Step:
        """Return as much of a step as one batch takes."""
        room = self.max_ops - len(step.ended)
        full = step.full[:room]
        return step._replace(full=full, asked=step.asked[: room - len(full)])

    def _batch(self, step: Step) -> Batch:
        """Return what to ask. With several streams the step before may still be running."""
        tick = step.tick
        room = MOST_BATCH_KEYS * KEY_BYTES
        ops: list[Op] = []
        for ended in step.ended:
            free = self._free(ended, room)
            room -= len(free.keys)
            ops.append(free)
        ops += [Extend(run.handle, run.lead + tick + 1) for run in step.full]
        for asked in step.asked:
            allocate = self._allocate(asked, room)
            room -= len(allocate.keys)
            ops.append(allocate)
        final = self._kind.granule_tokens > 0  # nothing is speculative here
        held = ((run.handle, run.lead + tick) for run in step.running.values())
        used = [Used(handle, tokens, False, tokens * final) for handle, tokens in held]
        late = not self._kind.single_stream and step.number - self._answered_step < 2
        completed_seq = max(self._seq - late, 0)
        return Batch(self._seq + 1, completed_seq, used, ops, pass_refused=step.pass_refused)

    def _free(self, ended: Ended, most: int) -> Free:
        """Return what gives a run back. What it has written is kept as far as its keys go."""
        run, end, output_tokens = ended
        written = run.request.prompt_tokens + output_tokens
        sent = self._sent.pop(run.handle)
        self._shared.pop(run.handle, None)
        keys = self._keys(run.request, written)[sent:][:most]
        keep = written if sent or keys else 0
        return Free(run.handle, end, output_tokens, keep, keys)

    def _keys(self, request: Request, tokens: int) -> bytes:
        """Return the keys of the granules that so many of a request's tokens fill."""
        granule = self._kind.granule_tokens
        if not granule or not request.block_ids:
            return b""
        most = min(tokens // granule, MOST_KEYS)
        return keys_of(request.block_ids, self._block_tokens, granule)[: most * KEY_BYTES]

    def _allocate(self, asked: Asked, most: int) -> Allocate:
        request = asked.request
        maximum = request.total_tokens if self._exact else request.maximum_tokens
        return Allocate(
            str(asked.number),
            request.prompt_tokens,
            asked.generated_tokens,
            maximum,
            request.request_class,
            request.tenant,
            text=request.text,
            keys=self._keys(request, request.prompt_tokens + asked.generated_tokens)[:most],
        )

    def _grow(self, step: Step, results: list[Result], decision: Decision) -> None:
        victims: dict[int, Run] = {}
        by_handle: dict[int, Run] | None = None
        for run, result in zip(step.full, results, strict=True):
            if isinstance(result, Place):
                run.room = result.length_tokens
                continue
            assert isinstance(result, Refusal)
            decision.stalled.append(run)
            if result.reason not in PREEMPT:
                continue
            handle = result.preempt_handle
            if len(step.running) == 1 and result.awaiting_completion_tokens:
                continue
            if self._asker_is_victim or len(step.running) == 1:
                handle = run.handle
            if by_handle is None:
                by_handle = {each.handle: each for each in step.running.values()}
            if handle:
                victims[handle] = by_handle[handle]
        decision.victims = list(victims.values())

    def _admit(self, step: Step, results: list[Result], decision: Decision) -> None:
        refused = False
        for asked, result in zip(step.asked, results, strict=True):
            if isinstance(result, Place):
                placed = Placed(result.handle, result.length_tokens, result.reused_tokens)
                decision.placed.append(placed)
                continue
            assert isinstance(result, Refusal)
            if result.reason is Reason.INVALID:  # nothing that ends would let it in
                raise InvalidError(
                    result.field,
                    f"request {asked.number} can never be let in: "
                    f"{asked.request.prompt_tokens:,} tokens of prompt, "
                    f"{asked.request.maximum_tokens:,} at most, tenant {asked.request.tenant!r}",
                )
            decision.placed.append(None)
            if result.preempt_handle:  # its tenant's guarantee is lent out
                self._call_in(step, result.preempt_handle, decision)
            if refused:
                continue
            refused = True
            # Skipped: a region could not grow, and nobody looked for room for this one.
            passing = result.reason in PASSING or result.reason is Reason.SKIPPED
            decision.again |= passing or result.awaiting_completion_tokens > 0

    def _call_in(self, step: Step, handle: int, decision: Decision) -> None:
        """Preempt a region for a claim; one that is younger than this batch in the next."""
        named = [run for run in step.running.values() if run.handle == handle]
        decision.victims += [run for run in named if run not in decision.victims]
        decision.again |= not named

    def _note_reuse(self, batch: Batch, answer: Answer) -> None:
        """Remember what keys were sent for, and where what is read with others lies."""
        for op, result in zip(batch.ops, answer.results, strict=True):
            if isinstance(op, Allocate) and isinstance(result, Place):
                self._sent[result.handle] = len(op.keys)
        for place in (*answer.moved, *answer.results):
            if isinstance(place, Place) and place.shared_tokens:
                self._shared[place.handle] = place.shared_start_token, place.shared_tokens

    def _unread(self, decision: Decision) -> int:
        """Return what a step reads less because it reads what is shared once."""
        idle = {run.handle for run in (*decision.stalled, *decision.victims)}
        reading = [run for handle, run in self._shared.items() if handle not in idle]
        longest: dict[int, int] = {}
        for start, tokens in reading:
            longest[start] = max(longest.get(start, 0), tokens)
        more = len(reading) * self._kind.second_run_tokens
        return sum(tokens for _, tokens in reading) - sum(longest.values()) - more


def parts(step: Step, results: list[Result]) -> tuple[list[Result], list[Result], list[Result]]:
    """Return the results for what has ended, what was full and who asked."""
    frees, extends = len(step.ended), len(step.full)
    return results[:frees], results[frees : frees + extends], results[frees + extends :]
