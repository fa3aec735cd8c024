"""Planning: how a device's memory divides for a model, and what each policy would give there.

The memory of a rank is its weights, a reserve for activations and the runtime, and the rest: KV.
The rest is what a pool gets. What a policy makes of it is asked of the replay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from odma_service.errors import InvalidError
from odma_service.pool import PoolSpec
from odma_service.pool.geometry import Geometry
from odma_service.replay.compare import Comparison, as_object
from odma_service.traces import Trace
from odma_service.values import Moves

RESERVE_SHARE = 0.1
"""Of a rank's memory, for activations and the runtime. An assumption: an engine knows better."""
SPREAD = 0.9
"""Sigma of log-normal lengths, as of the chats of traces/synthetic.py. An assumption."""
LENGTHS_ROWS = 2_000

PLANNED = MappingProxyType(
    {
        "static": "the longest possible answer is reserved; what most engines do without pages",
        "odma": "a predicted length is reserved; an engine that moves only what grows",
        "elastic": "grows and moves; an engine that moves everything, in one stream",
        "paged-16": "pages of 16 tokens, read at the bandwidth emulated for them",
        "ideal-16": "pages of 16 tokens, as if their reads cost nothing more",
    }
)
"""What a plan compares, and what each means to who reads it."""


@dataclass(frozen=True, slots=True)
class Division:
    """How the memory of one rank is divided, in bytes."""

    memory_bytes: int
    weight_bytes: int
    reserve_bytes: int
    geometry: Geometry
    block_tokens: int = 16

    def __post_init__(self) -> None:
        if self.capacity_tokens < self.block_tokens:
            left = self.memory_bytes - self.weight_bytes - self.reserve_bytes
            raise InvalidError(
                "memory",
                f"{self.weight_bytes:,} bytes of weights and {self.reserve_bytes:,} in reserve"
                f" leave {left:,} of {self.memory_bytes:,}: not one block of KV",
            )

    @property
    def capacity_tokens(self) -> int:
        """Tokens of the pool, in whole blocks."""
        left = self.memory_bytes - self.weight_bytes - self.reserve_bytes
        return self.geometry.tokens_in(left) // self.block_tokens * self.block_tokens

    def books_bytes(self, model_length_tokens: int, max_regions: int) -> int:
        """Return the bytes of the pool's file, on the host."""
        spec = PoolSpec(
            name="plan",
            open_id="plan",
            geometry=self.geometry,
            capacity_tokens=self.capacity_tokens,
            model_length_tokens=model_length_tokens,
            moves=Moves.ANY,
            block_tokens=self.block_tokens,
            max_regions=max_regions,
        )
        return spec.arena_geometry().file_bytes

    def as_object(self) -> dict[str, int]:
        """Return the division as JSON has it."""
        kv_bytes = self.capacity_tokens * self.geometry.bytes_per_token
        return {
            "memory_bytes": self.memory_bytes,
            "weight_bytes": self.weight_bytes,
            "reserve_bytes": self.reserve_bytes,
            "kv_bytes": kv_bytes,
            "bytes_per_token": self.geometry.bytes_per_token,
            "capacity_tokens": self.capacity_tokens,
        }


def load_of_lengths(prompt_tokens: int, output_tokens: int) -> Trace:
    """Return LENGTHS_ROWS requests with these mean lengths, log-normal, the same each time.

    The mean of a log-normal is exp(mu + sigma^2 / 2). Nothing is known of arrivals: all are there
    at the start.
    """
    random = np.random.default_rng(0)

    def drawn(mean: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        lengths = random.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD, LENGTHS_ROWS)
        return np.maximum(lengths.round(), 1).astype(np.int64)

    return Trace(
        t_seconds=np.zeros(LENGTHS_ROWS),
        input_tokens=drawn(prompt_tokens),
        output_tokens=drawn(output_tokens),
        label=f"made up: prompts of {prompt_tokens:,} and answers of {output_tokens:,} tokens",
    )


def expected(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Return what is to be expected of each policy, by its name."""
    policies: Mapping[str, Mapping[str, Any]] = as_object(comparison)["policies"]
    static = policies["static"]["tokens_per_s"]
    return {
        name: {
            "means": meaning,
            "tokens_per_s": row["tokens_per_s"],
            "over_static": round(row["tokens_per_s"] / static, 3),
            "concurrency": row["mean_running"],
            "written_share": row["utilisation_written_over_capacity"],
            "ttft_p50_s": row["ttft_p50_s"],
            "ttft_p99_s": row["ttft_p99_s"],
            "preemptions": row["preemptions"],
        }
        for name, meaning in PLANNED.items()
        for row in [policies[name]]
    }
