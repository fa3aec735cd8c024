"""What an arena is made from and what it tells, as values.

They mirror the structs of odma.h, with lengths in tokens instead of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from odma_service._native._odma import ffi, lib
from odma_service._native.rules import (
    broken_rule,
    new_reason,
    set_field,
    set_items,
    set_name,
)
from odma_service.errors import InvalidError
from odma_service.values import Moves, Overflow, Quantiles, Start, TenantShare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

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
    granule_tokens: int = 0

    @property
    def most_entries(self) -> int:
        """Entries that the books may have: as many may wait as may live, and as many be kept."""
        return (3 if self.granule_tokens else 2) * self.max_regions

    @property
    def file_bytes(self) -> int:
        """Bytes of the file of books of this geometry, 0 for a bad one."""
        return int(lib.odma_geometry_file_bytes(ffi.new("odma_geometry *", self._asdict())))

    def check(self) -> None:
        """Raise InvalidError with the field that breaks its rule."""
        struct, reason = ffi.new("odma_geometry *"), new_reason()
        for field, value in self._asdict().items():
            set_field(struct, field, value)
        if lib.odma_geometry_check(struct, reason) != lib.ODMA_OK:
            raise broken_rule(reason)


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
    reads_two_runs: bool = False


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
        reason = new_reason()
        if lib.odma_policy_check(policy_struct(self), reason) != lib.ODMA_OK:
            raise broken_rule(reason)

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


_POLICY_NUMBERS = (
    "start",
    "overflow",
    "step_tokens",
    "max_copy_tokens",
    "overflow_risk",
    "safety_share",
    "unsure_ratio",
    "growth",
    "tenant_share",
)


def policy_struct(policy: PolicyRecord) -> Any:
    """Return `policy` as an odma_policy *. Raises InvalidError for what C has no room for."""
    struct = ffi.new("odma_policy *")
    set_name(struct, policy.name, "name")
    for field in _POLICY_NUMBERS:
        set_field(struct, field, getattr(policy, field))
    set_items(struct, "limits_tokens", policy.limits_tokens)
    struct.limit_count = len(policy.limits_tokens)
    if len(policy.tenants) > lib.ODMA_TENANTS:
        raise InvalidError("tenants", f"at most {lib.ODMA_TENANTS}, not {len(policy.tenants)}")
    struct.tenant_count = len(policy.tenants)
    for i, tenant in enumerate(policy.tenants):
        set_name(struct.tenants[i], tenant.name, f"tenants[{i}].name")
        for field in ("guaranteed_share", "maximum_share"):
            set_field(struct.tenants[i], field, getattr(tenant, field), f"tenants[{i}].{field}")
    return struct


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


class Reuse(NamedTuple):
    """What is kept and reused; totals are counted since the file was made."""

    kept_runs: int = 0
    kept_tokens: int = 0
    prompt_tokens: int = 0
    adopted_tokens: int = 0
    gathered_tokens: int = 0
    shared_tokens: int = 0
    given_up_tokens: int = 0

    @property
    def reused_tokens(self) -> int:
        """Tokens of all requests that needed no prefill."""
        return self.adopted_tokens + self.gathered_tokens + self.shared_tokens


class Recovery(IntEnum):
    """What attach found half done: nothing, a record to drop, or one to apply again."""

    CLEAN = 0
    DROPPED = 1
    REDONE = 2


class ArenaReport(NamedTuple):
    """The books in numbers. epoch 0: none is running; free tokens exclude waiting ones.

    Kept memory counts as free.
    """

    epoch: int
    last_epoch: int
    seq: int
    completed_seq: int
    owner: int
    number: int
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
    reuse: Reuse


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
    """One entry of the books: a live region, a kept run, or one that waits for a completion."""

    live: bool
    kept: bool
    handle: int
    start_token: int
    length_tokens: int
    used_tokens: int
    shareable_tokens: int
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
