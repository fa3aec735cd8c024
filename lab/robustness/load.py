"""A load that keeps a pool nearly full, so that most of its batches have to move regions."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from lab.robustness.twin import Held, Twin
from odma_service.values import Allocate, Batch, End, Extend, Free, Op, Trim, Used

MOST_TOTAL_TOKENS = 1_024
LONGEST_PROMPT_TOKENS = 600
ENDS = (End.FINISHED, End.FINISHED, End.HIT_LIMIT, End.ABORTED, End.PREEMPTED)


@dataclass
class RandomBatches:
    """Asks for batches that fit a twin. The engine lists every region it holds."""

    random: Random
    capacity_tokens: int
    most_ops: int = 4
    serial: int = 0

    def batch(self, twin: Twin, seq: int, completed_seq: int = 0) -> Batch:
        """Return the next batch of an engine that holds what `twin` says.

        `completed_seq` is what it has said of completion before.
        """
        regions = list(twin.held.values())
        used = [Used(region.handle, self._written(region)) for region in regions]
        leaving = self._leaving(regions)
        gone = {region.handle for region in leaving}
        ops: list[Op] = [
            Free(region.handle, self.random.choice(ENDS), self.random.randrange(1, 500))
            for region in leaving
        ]
        free_tokens = self.capacity_tokens - sum(region.length_tokens for region in regions)
        free_tokens += sum(region.length_tokens for region in leaving)
        ops += self._changing([entry for entry in used if entry.handle not in gone], twin)
        while len(ops) < self.most_ops and free_tokens > LONGEST_PROMPT_TOKENS:
            ops.append(self._arriving())
            free_tokens -= LONGEST_PROMPT_TOKENS
        return Batch(seq, max(seq - 2, completed_seq), used, ops, pass_refused=bool(seq % 2))

    def alone(self, twin: Twin) -> Op:
        """Return an operation to be done outside of batches."""
        regions = list(twin.held.values())
        kind = self.random.randrange(4) if regions else 0
        if kind == 0:
            return self._arriving()
        region = self.random.choice(regions)
        if kind == 1:
            return Free(region.handle, self.random.choice(ENDS), self.random.randrange(1, 500))
        if kind == 2:
            return Trim(region.handle, self._written(region))
        return Extend(region.handle, min(region.length_tokens + 1, MOST_TOTAL_TOKENS))

    def _written(self, region: Held) -> int:
        return max(region.length_tokens - self.random.randrange(64), 1)

    def _leaving(self, regions: list[Held]) -> list[Held]:
        """Choose who ends: somebody in every other step, once there are some."""
        if len(regions) < self.most_ops or self.random.random() < 0.5:
            return []
        return [self.random.choice(regions)]

    def _changing(self, used: list[Used], twin: Twin) -> list[Op]:
        """Choose who gets more room, or now and then gives back what it has not written."""
        if not used:
            return []
        handle, used_tokens, *_ = self.random.choice(used)
        length_tokens = twin.held[handle].length_tokens
        if length_tokens >= MOST_TOTAL_TOKENS or self.random.random() < 0.1:
            return [Trim(handle, used_tokens)]
        return [Extend(handle, length_tokens + 1)]

    def _arriving(self) -> Allocate:
        self.serial += 1
        return Allocate(
            request_id=f"request-{self.serial}",
            prompt_tokens=self.random.randint(20, LONGEST_PROMPT_TOKENS),
            max_total_tokens=MOST_TOTAL_TOKENS,
        )
