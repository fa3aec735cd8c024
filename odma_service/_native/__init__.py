"""libodma as Python classes. No cdata leaves this package."""

from odma_service._native.arena import (
    CLASS_OTHER,
    CLASS_POOL,
    Arena,
    optimal_limits,
)
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
    TenantUse,
)

__all__ = [
    "CLASS_OTHER",
    "CLASS_POOL",
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
    "TenantUse",
    "optimal_limits",
]
