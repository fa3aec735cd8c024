"""The arena as a memory: a real pool under a policy record, in this process.

What is decided here is what the service would decide: the same C, the same Learner. Only the
engine around it is simulated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from odma_service.learning import Learner
from odma_service.pool import Pool, PoolSpec
from odma_service.pool.geometry import Geometry
from odma_service.pool.policy import PolicyRecord
from odma_service.replay.load import BLOCK_TOKENS, Limits
from odma_service.replay.memory import Asked, Decision, Placed, Run, Step
from odma_service.replay.predict import Predictor
from odma_service.replay.prices import Serving
from odma_service.values import (
    Allocate,
    Batch,
    Extend,
    Free,
    Moves,
    Op,
    Overflow,
    Place,
    PlaneGroup,
    Quantiles,
    Reason,
    Refusal,
    Result,
    Start,
    Used,
)

EPOCH = 1
PREEMPT = {Reason.NO_SPACE, Reason.FRAGMENTED}
PASSING = {Reason.COPY_BUDGET, Reason.WAITS_FOR_COMPLETION, Reason.PINNED}


@dataclass(frozen=True, slots=True)
class EngineKind:
    """What the engine lets the pool move, and on how many streams it runs."""

    moves: Moves = Moves.ANY
    single_stream: bool = True
    copies_may_overlap: bool = True


class PolicyEvent(NamedTuple):
    """What is in force from some step on."""

    step: int
    safety_share: float
    limits_tokens: tuple[int, ...]


class ArenaMemory:
    """A pool in an arena of its own, removed when closed."""

    def __init__(
        self,
        directory: Path,
        limits: Limits,
        serving: Serving,
        policy: PolicyRecord,
        kind: EngineKind,
        predictor: Predictor,
        *,
        exact_lengths: bool = False,
        batch_cap: int = 256,
    ) -> None:
        self._path = directory / "replay.arena"
        spec = PoolSpec(
            name="replay",
            open_id="replay",
            geometry=_geometry(serving),
            capacity_tokens=limits.capacity_tokens,
            model_length_tokens=limits.model_length_tokens,
            moves=kind.moves,
            device=serving.copying,
            single_ordered_stream=kind.single_stream,
            copies_may_overlap=kind.copies_may_overlap,
            block_tokens=BLOCK_TOKENS,
            max_regions=max(1024, batch_cap),
        )
        self._pool = Pool.create(self._path, spec, EPOCH, "replay", policy)
        self._step = 0
        self._learner = Learner(self._pool, model=lambda: predictor.model, step=lambda: self._step)
        self._single = kind.single_stream
        self._asker_is_victim = policy.overflow is Overflow.PREEMPT
        self._predicts = policy.start is Start.QUANTILE
        self._predictor = predictor
        self._exact = exact_lengths
        self._limits = policy.limits_tokens
        self._seq = 0
        self._answered_step = -2
        self.events: list[PolicyEvent] = []
        self.recalibrations = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()
        self._path.unlink()

    @property
    def pool(self) -> Pool:
        """The pool, for reading."""
        return self._pool

    @property
    def learner(self) -> Learner:
        """The learner around the pool, for reading."""
        return self._learner

    @property
    def kv_bandwidth_share(self) -> float:
        """Regions read as long runs."""
        return 1.0

    def decide(self, step: Step) -> Decision:
        """Give back, grow and admit, in one batch."""
        tick = step.tick
        self._step = step.number  # steps without a batch let knowledge grow old, too
        ops: list[Op] = [Free(run.handle, end, output) for run, end, output in step.ended]
        ops += [Extend(run.handle, run.lead + tick + 1) for run in step.full]
        ops += [self._allocate(asked) for asked in step.asked]
        used = [Used(run.handle, run.lead + tick) for run in step.running.values()]
        version = self._pool.policy().version
        late = not self._single and step.number - self._answered_step < 2
        batch = Batch(self._seq + 1, max(self._seq - late, 0), used, ops)
        answer = self._learner.apply(EPOCH, batch, self._predictions(step))
        self._seq = answer.seq
        self._answered_step = step.number

        decision = Decision(
            copies=len(answer.copies), copied_tokens=sum(copy.tokens for copy in answer.copies)
        )
        frees, fulls = len(step.ended), len(step.full)
        self._grow(step, answer.results[frees : frees + fulls], decision)
        self._admit(step, answer.results[frees + fulls :], decision)
        # What has ended teaches from the next batch on, and shorter regions may fit then.
        decision.again |= self._predicts and bool(step.ended)
        if self._pool.policy().version != version:
            decision.again = True
            self._note_policy(step)
        return decision

    def _note_policy(self, step: Step) -> None:
        policy = self._pool.policy()
        self.recalibrations += policy.limits_tokens != self._limits
        self._limits = policy.limits_tokens
        self.events.append(PolicyEvent(step.number, policy.safety_share, policy.limits_tokens))

    def _allocate(self, asked: Asked) -> Allocate:
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
        )

    def _predictions(self, step: Step) -> list[Quantiles | None] | None:
        if not self._predictor.own or not step.asked:
            return None
        known = [self._predictor.quantiles(asked) for asked in step.asked]
        return [None] * (len(step.ended) + len(step.full)) + known

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
        for result in results:
            if isinstance(result, Place):
                decision.placed.append(Placed(result.handle, result.length_tokens))
                continue
            assert isinstance(result, Refusal)
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


def _geometry(serving: Serving) -> Geometry:
    return Geometry((PlaneGroup(serving.planes, serving.kv_bytes_per_token // serving.planes),))
