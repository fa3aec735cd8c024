"""The pools of the service, by name: opened, found again after a restart, taken over, closed.

Each pool is a file NAME.pool in one directory. Two kinds of locks, taken in this order: the
registry's, for which pools there are; then a pool's own, for all that is done with it, so that
a slow call holds up nobody but callers of the same pool. A retry that meets its running
original waits for it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import structlog

from odma_service.errors import (
    BooksCorruptError,
    BooksError,
    BooksForeignError,
    BooksMismatchError,
    EpochError,
    InvalidError,
    OdmaError,
    PoolLimitError,
    PoolNotFoundError,
    PoolOwnedError,
)
from odma_service.learning import Learner
from odma_service.policy import PolicyRecord
from odma_service.pool import Pool, PoolSpec, set_aside

SUFFIX = ".pool"
UNFINISHED = ".new"
UNUSABLE = (BooksForeignError, BooksMismatchError, BooksCorruptError)

log = structlog.get_logger()


class Opened(NamedTuple):
    """What an owner is told about its pool."""

    spec: PoolSpec
    epoch: int
    policy_version: int


class View(NamedTuple):
    """A pool to look at. idle_seconds count from its owner's last call."""

    pool: Pool
    idle_seconds: float


class Entry:
    """A pool and when its owner was last heard of. pool None: it is gone."""

    __slots__ = ("heard_at", "learner", "lock", "pool")

    def __init__(self, pool: Pool, now: float) -> None:
        self.lock = Lock()
        self.adopt(pool, now)

    def adopt(self, pool: Pool, now: float) -> None:
        """Make this the entry of `pool`, whose owner was heard of now."""
        self.pool: Pool | None = pool
        self.learner = Learner(pool)
        self.heard_at = now


class Registry:
    """All pools of one directory, which nobody else may write to.

    `monotonic` and `wall` tell seconds. `boot_id` names the run of the machine: device memory
    does not outlive it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_pools: int,
        boot_id: str,
        monotonic: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._directory = directory
        self._max_pools = max_pools
        self._boot_id = boot_id
        self._monotonic = monotonic
        self._wall = wall
        self._lock = Lock()
        self._entries: dict[str, Entry] = {}

    def attach_all(self) -> None:
        """Find the pools of an earlier run again; say of each that cannot be used why."""
        for leftover in self._directory.glob(f"*{SUFFIX}{UNFINISHED}"):
            leftover.unlink()
        for path in sorted(self._directory.glob(f"*{SUFFIX}")):
            try:
                self._find(path.name.removesuffix(SUFFIX))
            except PoolNotFoundError:
                pass  # set aside, and logged
            except (OdmaError, OSError) as error:
                log.error("pool left alone", file=str(path), reason=str(error))

    def close(self) -> None:
        """Give all files back. Epochs go on: the next start finds them."""
        with self._lock:
            for entry in self._entries.values():
                with entry.lock:
                    if entry.pool:
                        entry.pool.close()
                    entry.pool = None
            self._entries.clear()

    def names(self) -> list[str]:
        """Return the names of all pools."""
        return sorted(self._entries)

    def open(
        self, spec: PoolSpec, policy: PolicyRecord, *, keep_policy: bool, take_over: bool
    ) -> Opened:
        """Begin an epoch, in the books of an earlier one where their geometry is the same.

        While an epoch lives, its open_id gets the same answer again. `policy` is installed
        unless `keep_policy` is set and the pool has one already. Raises PoolOwnedError,
        PoolLimitError, InvalidError, BooksLockedError.
        """
        with self._lock:
            entry = self._entry(spec.name)
            if entry is None:
                entry = self._create(spec, policy)
            with entry.lock:
                pool = self._insist(spec.name, entry)
                if not self._is_retry(pool, spec):
                    self._check_free(entry, pool, take_over)
                    self._begin(entry, pool, spec, None if keep_policy else policy, policy)
                return self._opened(entry)
