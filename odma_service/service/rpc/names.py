"""The pool that a request is about."""

from __future__ import annotations

from odma_service.errors import InvalidError
from odma_service.pool import NAME, NAME_RULE
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.values import Caller


def name_from(name: str, field: str = "name") -> str:
    """Return a pool's name, which is also safe as a file name."""
    if not NAME.fullmatch(name):
        raise InvalidError(field, NAME_RULE)
    return name


def ref_from(ref: types.PoolRef) -> tuple[str, Caller]:
    """Return the name of the pool that a message with a number is about, and who asks."""
    if ref.owner and not ref.number:
        raise InvalidError("pool.number", "1, 2, ... with an owner number")
    return unnumbered_ref_from(ref)


def unnumbered_ref_from(ref: types.PoolRef) -> tuple[str, Caller]:
    """Return the name of the pool that a request is about, and who asks."""
    if ref.epoch == 0:
        raise InvalidError("pool.epoch", "the epoch that OpenPool answered")
    return name_from(ref.name, "pool.name"), Caller(ref.epoch, ref.owner, ref.number)
