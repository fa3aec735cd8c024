"""The arena as a memory: a real pool under a policy record, in this process.

What is decided here is what the service would decide: the same C, the same Learner. Only the
engine around it is simulated.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Self

from odma_service.learning import Learner
from odma_service.pool import Pool, PoolSpec
from odma_service.pool.geometry import Geometry
from odma_service.pool.policy import PolicyRecord
from odma_service.replay.load import BLOCK_TOKENS, Limits
from odma_service.replay.memory import Step
from odma_service.replay.pooled import EngineKind, PoolMemory
from odma_service.replay.predict import Predictor
from odma_service.replay.prices import Serving
from odma_service.traces.trace import PREFIX_TOKENS
from odma_service.values import Answer, Batch, PlaneGroup, Quantiles

EPOCH = 1


class PolicyEvent(NamedTuple):
    """What is in force from some step on."""

    step: int
    safety_share: float
    limits_tokens: tuple[int, ...]


class ArenaMemory(PoolMemory):
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
        block_tokens: int = PREFIX_TOKENS,
    ) -> None:
        super().__init__(policy, kind, exact_lengths=exact_lengths, block_tokens=block_tokens)
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
            max_ops=self.max_ops,
            granule_tokens=kind.granule_tokens,
            reads_two_runs=kind.reads_two_runs,
        )
        self._pool = Pool.create(self._path, spec, EPOCH, "replay", policy)
        self._step = 0
        self._learner = Learner(self._pool, model=lambda: predictor.model, step=lambda: self._step)
        self._predictor = predictor
        self._limits = policy.limits_tokens
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

    def _apply(self, step: Step, batch: Batch) -> tuple[Answer, bool]:
        self._step = step.number  # steps without a batch let knowledge grow old, too
        version = self._pool.policy().version
        answer = self._learner.apply(EPOCH, batch, self._predictions(step))
        changed = self._pool.policy().version != version
        if changed:
            self._note_policy(step)
        return answer, changed

    def _note_policy(self, step: Step) -> None:
        policy = self._pool.policy()
        self.recalibrations += policy.limits_tokens != self._limits
        self._limits = policy.limits_tokens
        self.events.append(PolicyEvent(step.number, policy.safety_share, policy.limits_tokens))

    def _predictions(self, step: Step) -> list[Quantiles | None] | None:
        if not self._predictor.own or not step.asked:
            return None
        known = [self._predictor.quantiles(asked) for asked in step.asked]
        return [None] * (len(step.ended) + len(step.full)) + known


def _geometry(serving: Serving) -> Geometry:
    """Return planes as many and as large together as the model's: one has what is over."""
    planes = serving.planes
    each, over = divmod(serving.kv_bytes_per_token, planes)
    groups = (PlaneGroup(planes - 1, each), PlaneGroup(1, each + over))
    return Geometry(groups if over else (PlaneGroup(planes, each),))
