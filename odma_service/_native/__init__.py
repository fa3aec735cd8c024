"""libodma as Python classes. No cdata leaves this package."""

from odma_service._native.arena import (
    CLASS_OTHER,
    CLASS_POOL,
    Arena,
    file_geometry,
    optimal_limits,
)
from odma_service._native.operations import TEXT_RULE, text_of
from odma_service._native.records import (
    ArenaGeometry,
    ArenaReport,
    Completion,
    Counters,
    EngineRecord,
    Histogram,
    Part,
    PolicyRecord,
    Recovery,
    RegionEntry,
    Salvaged,
    TenantShare,
    TenantUse,
)

__all__ = [
    "CLASS_OTHER",
    "CLASS_POOL",
    "TEXT_RULE",
    "Arena",
    "ArenaGeometry",
    "ArenaReport",
    "Completion",
    "Counters",
    "EngineRecord",
    "Histogram",
    "Part",
    "PolicyRecord",
    "Recovery",
    "RegionEntry",
    "Salvaged",
    "TenantShare",
    "TenantUse",
    "file_geometry",
    "optimal_limits",
    "text_of",
]
