"""The domain: one pool with its geometry, its policy and its books.

pool      the door, for the service and for an engine that embeds a pool
openers   who has opened a pool, so that a late OpenPool changes nothing
geometry  what a token takes in every plane, and how many tokens fit on a device
policy    the four named policies
books     a pool's file as an operator finds it: a copy to look into, setting it aside
"""

from odma_service._native import MOST_CAPACITY_TOKENS
from odma_service.pool.books import set_aside
from odma_service.pool.openers import NO_INSTANCE, NOBODY, Openers, Opening
from odma_service.pool.pool import (
    MOST_EPOCH,
    NAME,
    NAME_RULE,
    ClassHistory,
    Pool,
    PoolSpec,
)

__all__ = [
    "MOST_CAPACITY_TOKENS",
    "MOST_EPOCH",
    "NAME",
    "NAME_RULE",
    "NOBODY",
    "NO_INSTANCE",
    "ClassHistory",
    "Openers",
    "Opening",
    "Pool",
    "PoolSpec",
    "set_aside",
]
