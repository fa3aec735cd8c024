"""What an arena is made from and what it tells, as values.

They mirror the structs of odma.h, with lengths in tokens instead of blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from odma_service.errors import InvalidError
from odma_service.values import Moves, Overflow, Quantiles, Start, TenantShare

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

LARGEST_STEP_TOKENS = 2**20
MOST_LIMITS = 16
MOST_TENANTS = 16
NAME_BYTES = 32
UINT32_MAX = 2**32 - 1


class ArenaGeometry(NamedTuple):
    """What the memory is; fixed for the life of a file."""

    blocks: int
    block_tokens: int
    max_regions: int
    max_ops: int
    max_copies: int
    model_length_tokens: int
    digest: int


class EngineRecord(NamedTuple):
    """What the engine can do and what its copies cost; fixed for an epoch.

    A plan costs planes x pieces x descriptor_seconds + tokens x token_seconds.
    """

    moves: Moves
    single_ordered_stream: bool
    copies_may_overlap: bool
    planes: int
    descriptor_seconds: float
    token_seconds: float


@dataclass(frozen=True, slots=True)
class PolicyRecord:
    """How long a region is, who is admitted and what may move.

    `version` counts changes and is the arena's to set; it is no part of what a record
    says. A field that breaks its rule is an InvalidError that names it.
    """

    name: str
    start: Start
    overflow: Overflow
    step_tokens: int = 16
    limits_tokens: tuple[int, ...] = ()
    overflow_risk: float = 0.1
    safety_share: float = 0.0
    unsure_ratio: float = 0.0
    growth: float = 1.0
    tenant_share: float = 1.0
    max_copy_tokens: int = UINT32_MAX - 1
    tenants: tuple[TenantShare, ...] = ()
    version: int = 0

    def __post_init__(self) -> None:
        limits = self.limits_tokens
        for field, holds, rule in (
            ("name", 1 <= len(self.name.encode()) <= NAME_BYTES, f"1 to {NAME_BYTES} bytes"),
            ("step_tokens", _is_count(self.step_tokens, 1, LARGEST_STEP_TOKENS), "1 to 2^20"),
            ("limits_tokens", len(limits) <= MOST_LIMITS, f"at most {MOST_LIMITS} limits"),
            ("limits_tokens", _ascend(limits), "ascending from at least 1, to 2^28"),
            ("overflow_risk", 0 <= self.overflow_risk <= 1, "0 to 1"),
            ("safety_share", 0 <= self.safety_share <= 0.9, "0 to 0.9"),
            ("unsure_ratio", _is_ratio(self.unsure_ratio), "0, or at least 1"),
            ("growth", 1 <= self.growth <= 4, "1 to 4"),
            ("tenant_share", 0 < self.tenant_share <= 1, "above 0, at most 1"),
            ("max_copy_tokens", _is_count(self.max_copy_tokens, 0, UINT32_MAX), "0 to 2^32 - 1"),
            *_tenant_rules(self.tenants, self.safety_share),
        ):
            if not holds:
                raise InvalidError(field, rule)

    @property
    def unguaranteed_share(self) -> float:
        """The share that is guaranteed to nobody: the most that the safety share may be."""
        return 1 - sum(tenant.guaranteed_share for tenant in self.tenants)

    def with_changes(
        self,
        *,
        step_tokens: int | None = None,
        limits_tokens: Sequence[int] = (),
        clear_limits: bool = False,
        overflow_risk: float | None = None,
        safety_share: float | None = None,
        unsure_ratio: float | None = None,
        growth: float | None = None,
        tenant_share: float | None = None,
        max_copy_tokens: int | None = None,
        tenants: Sequence[TenantShare] = (),
        clear_tenants: bool = False,
    ) -> PolicyRecord:
        """Return the record with the given fields changed; None and () keep a field."""
        if clear_limits and limits_tokens:
            raise InvalidError("clear_limits", "not together with limits_tokens")
        if clear_tenants and tenants:
            raise InvalidError("clear_tenants", "not together with tenants")
        given = {
            "step_tokens": step_tokens,
            "limits_tokens": () if clear_limits else tuple(limits_tokens) or None,
            "overflow_risk": overflow_risk,
            "safety_share": safety_share,
            "unsure_ratio": unsure_ratio,
            "growth": growth,
            "tenant_share": tenant_share,
            "max_copy_tokens": max_copy_tokens,
            "tenants": () if clear_tenants else tuple(tenants) or None,
        }
        changes = {field: value for field, value in given.items() if value is not None}
        return replace(self, **changes)  # type: ignore[arg-type]


def _tenant_rules(
    tenants: tuple[TenantShare, ...], safety_share: float
) -> Iterator[tuple[str, bool, str]]:
    """Yield field, whether it keeps its rule, and the rule."""
    yield "tenants", len(tenants) <= MOST_TENANTS, f"at most {MOST_TENANTS} tenants"
    for i, (name, guaranteed, maximum) in enumerate(tenants):
        field = f"tenants[{i}]"
        rule = f"1 to {NAME_BYTES} bytes without NUL"
        yield f"{field}.name", 1 <= len(name.encode()) <= NAME_BYTES and "\0" not in name, rule
        known = {tenant.name for tenant in tenants[:i]}
        yield f"{field}.name", name not in known, "each tenant once"
        yield f"{field}.maximum_share", 1e-9 <= maximum <= 1, "above 0, at most 1"
        yield f"{field}.guaranteed_share", 0 <= guaranteed <= maximum, "0 to maximum_share"
    guaranteed = sum(tenant.guaranteed_share for tenant in tenants)
    rule = "guaranteed_share of all and safety_share: at most 1 together"
    yield "tenants", not tenants or guaranteed + safety_share <= 1 + 1e-9, rule


def _is_count(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and least <= value <= most


def _ascend(limits: tuple[int, ...]) -> bool:
    return all(_is_count(limit, 1, 2**28) for limit in limits) and all(
        a < b for a, b in pairwise(limits)
    )


def _is_ratio(value: float) -> bool:
    return value == 0 or (value >= 1 and math.isfinite(value))


class Counters(NamedTuple):
    """Counted since the file was made; they outlive epochs."""

    batches: int
    allocates: int
    extends: int
    trims: int
    frees: int
    refused_allocates: int
    refused_extends: int
    preempted: int
    copies: int
    copied_tokens: int
    relocations: int
    compactions: int
    safety_hits_growth: int
    safety_hits_unsure: int
    finished: int
    hit_limit: int


class Recovery(IntEnum):
    """What attach found half done: nothing, a record to drop, or one to apply again."""

    CLEAN = 0
    DROPPED = 1
    REDONE = 2


class ArenaReport(NamedTuple):
    """The books in numbers. epoch 0: none is running; free tokens exclude waiting ones."""

    epoch: int
    last_epoch: int
    seq: int
    completed_seq: int
    live: int
    waiting: int
    free_runs: int
    free_tokens: int
    awaiting_completion_tokens: int
    largest_run_tokens: int
    reserved_tokens: int
    safety_tokens: int
    used_tokens: int
    classes: int
    rebooted: bool
    recovery: Recovery
    counters: Counters


class TenantUse(NamedTuple):
    """What one tenant of the policy holds; claimed_tokens 0: it waits for nothing it is sure of."""

    name: str
    regions: int
    held_tokens: int
    guaranteed_tokens: int
    maximum_tokens: int
    claimed_tokens: int

    @property
    def borrowed_tokens(self) -> int:
        """What it holds beyond its guarantee."""
        return max(self.held_tokens - self.guaranteed_tokens, 0)


class RegionEntry(NamedTuple):
    """One entry of the books: a live region, or (not live) a run that waits for a completion."""

    live: bool
    handle: int
    start_token: int
    length_tokens: int
    used_tokens: int
    awaits_seq: int
    birth: int
    prompt_tokens: int
    generated_tokens: int
    max_total_tokens: int
    request_class: str
    request_id: str


class Completion(NamedTuple):
    """One completed request. censored: it stopped at its limit, so "at least"."""

    quantiles: Quantiles | None
    prompt_tokens: int
    output_tokens: int
    censored: bool


COMPLETION = np.dtype(
    [
        ("quantiles", np.float32, 7),
        ("raw", np.float32, 7),
        ("overflow_risk", np.float32),
        ("prompt_tokens", np.uint32),
        ("output_tokens", np.uint32),
        ("censored", np.uint32),
        ("issue", np.uint64),
        ("until", np.uint64),
    ]
)
"""odma_completion as numpy has it. quantiles[0] < 0, or raw all 0: none."""


class Histogram(NamedTuple):
    """Decayed weights per bin, in units of the newest completion."""

    completions: int
    output_finished: NDArray[np.float64]
    output_censored: NDArray[np.float64]
    total_finished: NDArray[np.float64]
    total_censored: NDArray[np.float64]
