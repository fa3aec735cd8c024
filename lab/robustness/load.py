"""A load that keeps a pool nearly full, so that most of its batches have to move regions.

In a pool with granules its requests begin like others, and most leave what they have written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from lab.robustness.twin import Held, Twin
from odma_service.keys import chained_keys
from odma_service.values import KEY_BYTES, Allocate, Batch, End, Extend, Free, Op, Trim, Used

MOST_TOTAL_TOKENS = 1_024
LONGEST_PROMPT_TOKENS = 600
ENDS = (End.FINISHED, End.FINISHED, End.HIT_LIMIT, End.ABORTED, End.PREEMPTED)
TALKS = 16  # that requests begin with


class Prompt(NamedTuple):
    """What is final of a request as soon as it runs, and the keys that its Free adds."""

    tokens: int
    late_keys: bytes


@dataclass
class RandomBatches:
    """Asks for batches that fit a twin. The engine lists every region it holds."""

    random: Random
    capacity_tokens: int
    most_ops: int = 4
    serial: int = 0
    granule_tokens: int = 0  # of the pool; 0: nothing is reused
    prompts: dict[str, Prompt] = field(default_factory=dict)

    def batch(self, twin: Twin, seq: int, completed_seq: int = 0) -> Batch:
        """Return the next batch of an engine that holds what `twin` says.

        `completed_seq` is what it has said of completion before.
        """
        regions = list(twin.held.values())
        used = [self._used(region) for region in regions]
        leaving = self._leaving(regions)
        gone = {region.handle for region in leaving}
        ops: list[Op] = [self._free(region) for region in leaving]
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
            return self._free(region)
        if kind == 2:
            return Trim(region.handle, self._written(region))
        return Extend(region.handle, min(region.length_tokens + 1, MOST_TOTAL_TOKENS))

    def _written(self, region: Held) -> int:
        final = self.prompts[region.request_id].tokens if self.granule_tokens else 1
        return max(region.length_tokens - self.random.randrange(64), final)

    def _used(self, region: Held) -> Used:
        used = Used(region.handle, self._written(region))
        if self.granule_tokens and self.random.random() < 0.5:
            return used._replace(shareable_tokens=self.prompts[region.request_id].tokens)
        return used

    def _free(self, region: Held) -> Free:
        op = Free(region.handle, self.random.choice(ENDS), self.random.randrange(1, 500))
        if self.granule_tokens and self.random.random() < 0.8:
            prompt = self.prompts[region.request_id]
            return op._replace(keep_tokens=prompt.tokens, keys=prompt.late_keys)
        return op

    def _leaving(self, regions: list[Held]) -> list[Held]:
        """Choose who ends in every other step, once there are some: two where others reuse them."""
        if len(regions) < self.most_ops or self.random.random() < 0.5:
            return []
        return self.random.sample(regions, 2 if self.granule_tokens else 1)

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
        op = Allocate(
            request_id=f"request-{self.serial}",
            prompt_tokens=self.random.randint(20, LONGEST_PROMPT_TOKENS),
            max_total_tokens=MOST_TOTAL_TOKENS,
        )
        return op._replace(keys=self._keys(op)) if self.granule_tokens else op

    def _keys(self, op: Allocate) -> bytes:
        """Choose what a request begins with; the key of its end may come when it is freed."""
        talk, own = self.random.randrange(TALKS), self.random.random() < 0.3
        shared = self.random.randrange(op.prompt_tokens) if own else op.prompt_tokens
        tokens = [talk] * shared + [TALKS + self.serial] * (op.prompt_tokens - shared)
        keys = chained_keys(tokens, self.granule_tokens, b"")
        known = len(keys) - KEY_BYTES * self.random.randrange(2)
        self.prompts[op.request_id] = Prompt(op.prompt_tokens, keys[known:])
        return keys[:known]
