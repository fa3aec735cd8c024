"""libodma as Python classes. No cdata leaves this package."""

from odma_service._native.arena import (
    CLASS_OTHER,
    CLASS_POOL,
    LEARNT_ENOUGH,
    MOST_BLOCKS,
    MOST_CAPACITY_TOKENS,
    MOST_LIMITS,
    Arena,
    optimal_limits,
    own_faults,
)
from odma_service._native.operations import MOST_TEXT_BYTES, NAME_BYTES, TEXT_RULE, text_of
from odma_service._native.records import (
    ArenaGeometry,
    ArenaReport,
    Completion,
    Counters,
    EngineRecord,
    Histogram,
    PolicyRecord,
    Recovery,
    RegionEntry,
    Reuse,
    TenantUse,
)

__all__ = [
    "CLASS_OTHER",
    "CLASS_POOL",
    "LEARNT_ENOUGH",
    "MOST_BLOCKS",
    "MOST_CAPACITY_TOKENS",
    "MOST_LIMITS",
    "MOST_TEXT_BYTES",
    "NAME_BYTES",
    "TEXT_RULE",
    "Arena",
    "ArenaGeometry",
    "ArenaReport",
    "Completion",
    "Counters",
    "EngineRecord",
    "Histogram",
    "PolicyRecord",
    "Recovery",
    "RegionEntry",
    "Reuse",
    "TenantUse",
    "optimal_limits",
    "own_faults",
    "text_of",
]
