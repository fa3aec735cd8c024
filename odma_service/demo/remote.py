"""The checked memory of a pool behind a server."""

from __future__ import annotations

from odma_service.client import PoolClient
from odma_service.demo.checked import CheckedMemory
from odma_service.demo.device import Device
from odma_service.pool.policy import PolicyRecord
from odma_service.replay.pooled import EngineKind
from odma_service.traces.trace import PREFIX_TOKENS
from odma_service.values import Answer, Batch


class RemoteMemory(CheckedMemory):
    """An owner over gRPC, whose client numbers the batches."""

    def __init__(
        self,
        pool: PoolClient,
        device: Device,
        policy: PolicyRecord,
        kind: EngineKind,
        *,
        block_tokens: int = PREFIX_TOKENS,
    ) -> None:
        version = pool.response.policy_version
        super().__init__(device, policy, kind, version=version, block_tokens=block_tokens)
        self.max_ops = pool.response.max_ops
        self._pool = pool

    def _call(self, batch: Batch) -> Answer:
        return self._pool.apply(
            batch.used,
            batch.ops,
            completed_seq=batch.completed_seq,
            pass_refused=batch.pass_refused,
        )
