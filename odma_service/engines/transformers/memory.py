"""The pool behind an engine's planes: of a service, or in this process.

Copies of this engine are done when the next batch is asked, on one ordered stream, and may
overlap: the pool may move anything.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, Self

from odma_service.client import Client, PoolClient
from odma_service.engines.transformers.planes import Planes
from odma_service.learning import Learner
from odma_service.pool import Pool, PoolSpec
from odma_service.pool.geometry import Geometry
from odma_service.pool.policy import named
from odma_service.values import Answer, Batch, Moves, Op, PolicyChange, Used

EPOCH = 1
USUAL_POLICY = PolicyChange(name="elastic")
ENGINE: dict[str, Any] = {
    "moves": Moves.ANY,
    "single_ordered_stream": True,
    "copies_may_overlap": True,
}


class Memory(Protocol):
    """What an engine asks: a PoolClient, or an EmbeddedPool."""

    seq: int

    def apply(
        self,
        used: Iterable[Used] = ...,
        ops: Iterable[Op] = ...,
        *,
        completed_seq: int | None = ...,
    ) -> Answer:
        """Do one decode step's operations, once."""

    def resume(self) -> Answer:
        """Send a batch without an answer again."""

    def keep_alive(self) -> object:
        """Tell that the engine lives."""


def open_pool(
    service: Client, name: str, planes: Planes, policy: PolicyChange = USUAL_POLICY, **fields: Any
) -> PoolClient:
    """Open a pool of a service for these planes; `fields` as open_request() has them."""
    return service.open_pool(
        name,
        planes=planes.geometry(),
        capacity_tokens=planes.capacity_tokens,
        model_length_tokens=planes.longest_tokens,
        policy=policy,
        **ENGINE,
        **fields,
    )


class EmbeddedPool:
    """A pool in this process, without a service; its books are removed when it is closed."""

    def __init__(self, planes: Planes, policy: PolicyChange = USUAL_POLICY) -> None:
        """Raises InvalidError for a bad policy."""
        spec = PoolSpec(
            name="embedded",
            open_id="embedded",
            geometry=Geometry(tuple(planes.geometry())),
            capacity_tokens=planes.capacity_tokens,
            model_length_tokens=planes.longest_tokens,
            **ENGINE,
        )
        changes = policy._asdict()
        base = named(changes.pop("name"), spec.model_length_tokens, spec.capacity_tokens)
        self._directory = tempfile.TemporaryDirectory(prefix="odma-engine-")
        path = Path(self._directory.name) / "embedded.arena"
        self._pool = Pool.create(path, spec, EPOCH, "embedded", base.with_changes(**changes))
        self._learner = Learner(self._pool)
        self._batch = Batch(0, 0, [], [])
        self.seq = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_pool()

    @property
    def pool(self) -> Pool:
        """The pool, for reading."""
        return self._pool

    def apply(
        self, used: Iterable[Used] = (), ops: Iterable[Op] = (), *, completed_seq: int | None = None
    ) -> Answer:
        """Do a batch as PoolClient.apply does."""
        completed = self._batch.completed_seq if completed_seq is None else completed_seq
        self._batch = Batch(self.seq + 1, completed, list(used), list(ops))
        return self.resume()

    def resume(self) -> Answer:
        """Do the last batch, or return its answer if it was done."""
        answer = self._learner.apply(EPOCH, self._batch)
        self.seq = answer.seq
        return answer

    def keep_alive(self) -> None:
        """Do nothing: nobody waits for a sign."""

    def close_pool(self) -> None:
        """Remove the pool."""
        self._pool.close()
        self._directory.cleanup()
