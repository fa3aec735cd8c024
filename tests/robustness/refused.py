"""Run under refusals.c: let the n-th call of one kind fail, in turn, while pools are used.

usage: refused.py DIRECTORY KIND ERRNO
After each refusal nothing sound is given up, and everything goes on.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from registries import Clock, open_in, registry_of

from odma_service.errors import (
    BooksLockedError,
    BooksUnavailableError,
    PoolLimitError,
    PoolNotFoundError,
)
from odma_service.service.watch.events import EventKind
from odma_service.values import Allocate, Batch

system = ctypes.CDLL(None)
directory, kind, number = Path(sys.argv[1]), sys.argv[2].encode(), int(sys.argv[3])
PASSING = (BooksUnavailableError, PoolLimitError, BooksLockedError, OSError, MemoryError)
MOST = 200
clock = Clock()
refusals = []


@contextmanager
def refusing(n):
    """Refuse the n-th call; an error of that is a passing one."""
    system.refuse(kind, n, number)
    try:
        with suppress(*PASSING):
            yield
    finally:
        if system.has_refused():
            refusals.append(n)
        system.refuse(kind, 0, 0)


def step(registry, epoch, seq):
    with registry.owned("p", epoch) as learner:
        learner.apply(epoch, Batch(seq, 0, [], [Allocate(f"r{seq}", 10)]))


def sweep(name, act):
    """Do `act` with the first call refused, then the second, until none is refused."""
    for n in range(1, MOST):
        before = len(refusals)
        act(n)
        assert not list(directory.glob("*.set-aside-*")), (name, n)
        if len(refusals) == before:
            return
    raise AssertionError(f"{name}: still refused")


def attach(n):
    registry = registry_of(directory, clock, max_pools=8)
    with refusing(n):
        registry.attach_all()
    registry.close()
    registry = registry_of(directory, clock, max_pools=8)
    registry.attach_all()
    with registry.viewed("p") as view:
        assert (view.pool.epoch, view.pool.report().live) == (epoch, 2)
    registry.close()


def find(n):
    registry = registry_of(directory, clock, max_pools=8)
    try:
        with refusing(n), registry.owned("p", epoch) as learner:
            assert learner.pool.last_seq == 2
    except PoolNotFoundError:
        raise AssertionError("a pool that is there was not found") from None
    with registry.owned("p", epoch) as learner:
        assert learner.pool.last_seq == 2
    registry.close()


def use(n):
    registry = registry_of(directory, clock, max_pools=8)
    with registry.owned("p", epoch):
        pass
    with refusing(n):
        step(registry, epoch, 2)  # a repeated one
    with registry.viewed("p") as view:
        assert (view.pool.epoch, view.pool.report().live) == (epoch, 2)
    step(registry, epoch, 2)
    registry.close()


def create(n):
    registry = registry_of(directory, clock, max_pools=8)
    with refusing(n):
        open_in(registry, "new")
    opened = open_in(registry, "new")
    registry.close_epoch("new", opened.epoch)
    registry.close()
    (directory / "new.pool").unlink()


def change(n):
    """Open a closed pool with another geometry."""
    registry = registry_of(directory, clock, max_pools=8)
    first = open_in(registry, "other", open_id="first")
    registry.close_epoch("other", first.epoch)
    with refusing(n):
        open_in(registry, "other", open_id="second", block_tokens=32)
    second = open_in(registry, "other", open_id="second", block_tokens=32)
    assert second.epoch > first.epoch
    registry.close_epoch("other", second.epoch)
    registry.close()
    (directory / "other.pool").unlink()


def forget(n):
    """Open a pool for which the oldest closed one has to go."""
    registry = registry_of(directory, clock, max_pools=2)
    registry.attach_all()
    old = open_in(registry, "old")
    registry.close_epoch("old", old.epoch)
    with refusing(n):
        open_in(registry, "young")
    there = {path.name for path in directory.glob("*.pool")}
    assert len(there) == 2, there
    assert ("old.pool" in there) == (registry.telemetry.events.counts()[EventKind.FORGOTTEN] == 0)
    young = open_in(registry, "young")
    registry.close_epoch("young", young.epoch)
    registry.close()
    (directory / "young.pool").unlink()


first = registry_of(directory, clock, max_pools=8)
epoch = open_in(first, "p").epoch
step(first, epoch, 1)
step(first, epoch, 2)
first.close()
for act in (attach, find, use, create, change, forget):
    sweep(act.__name__, act)
print(len(refusals))
