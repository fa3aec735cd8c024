"""The pools of the service, by name: opened, found again after a restart, taken over, closed.

Each pool is a file NAME.pool in one directory. Two kinds of locks: the registry's, for the set
of pools; and a pool's own, for all work on it. Nobody waits for a pool's lock while he holds the
registry's, so a slow call holds up only callers of the same pool. A retry that comes while its
original runs waits for it there. The drain waits only so long.

Readers never take a pool's lock: its books lock themselves for the moment of a copy. What they
see is never older than their call. They have a lock of their own, and wait only so long for it;
whoever gives the books back takes it, last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import structlog

from odma_service.errors import (
    BooksCorruptError,
    BooksError,
    BooksForeignError,
    BooksMismatchError,
    BooksSpaceError,
    BooksUnavailableError,
    EpochError,
    HandleError,
    InvalidError,
    NotCompletedError,
    NothingLearntError,
    OdmaError,
    PoolLimitError,
    PoolNotFoundError,
    PoolOpenError,
    PoolOwnedError,
    RefusedError,
    UnavailableError,
    UnfencedError,
    VersionError,
)
from odma_service.learning import Learner, Model
from odma_service.pool import NO_INSTANCE, NOBODY, Opening, Pool, PoolSpec, set_aside
from odma_service.pool.openers import Openers
from odma_service.pool.policy import PolicyRecord
from odma_service.service.door.access import claimed, may_see
from odma_service.service.watch.events import EventKind
from odma_service.service.watch.telemetry import Telemetry
from odma_service.values import Caller

SUFFIX = ".pool"
UNFINISHED = ".new"
UNUSABLE = (BooksForeignError, BooksMismatchError, BooksCorruptError)
FINAL = (
    InvalidError,
    RefusedError,
    HandleError,
    VersionError,
    NothingLearntError,
    NotCompletedError,
)
"""Refusals of a message that must not succeed later, when its sender has gone on."""

READ_SECONDS = 5.0
"""A reader waits that long for other readers of its pool."""

log = structlog.get_logger()


class Opened(NamedTuple):
    """The answer to an owner that opens its pool."""

    spec: PoolSpec
    epoch: int
    owner: int
    policy_version: int
    policy_name: str


class View(NamedTuple):
    """A pool to look at, while its owner works. idle_seconds: since the last call of its owner."""

    learner: Learner
    """The readers' own; it has learnt the same."""
    idle_seconds: float

    @property
    def pool(self) -> Pool:
        """The pool itself."""
        return self.learner.pool


class Entry:
    """A pool and the time of its owner's last call.

    pool None: the pool is gone, or `trouble` says why its file could not be opened again.
    `shown` is the readers' own Learner, once there was a reader.
    """

    __slots__ = ("heard_at", "learner", "lock", "pool", "reading", "shown", "stale", "trouble")

    def __init__(self, learner: Learner, now: float) -> None:
        self.lock = Lock()
        self.reading = Lock()
        self.trouble: OdmaError | None = None
        self.pool: Pool | None = None
        self.shown: Learner | None = None
        self.adopt(learner, now)

    def adopt(self, learner: Learner, now: float) -> None:
        """Make this the entry of a pool whose owner calls now. Gives other books back."""
        if self.pool is not learner.pool:
            self.give_back(learner.pool)
        self.learner = learner
        self.heard_at = now
        self.stale = False  # as last reported

    def give_back(self, successor: Pool | None = None) -> None:
        """Give the books back, after their readers."""
        with self.reading:
            if self.pool is not None:
                self.pool.close()
            self.pool, self.shown = successor, None


class Registry:
    """All pools of one directory. Nobody else may write to it: see PoolDirectory.

    Books that fail in a call are read again from their file, as after a kill. What the file says
    decides: the epoch goes on, the books are set aside, or the system refuses them for a while.

    `last_epoch` is the highest that was ever given here, `keep_epoch` is told of a higher one.
    `most_bytes` bounds the files of all pools together.
    `monotonic` and `wall` return seconds, `model` returns the model that predicts now. `boot_id`
    names the run of the machine: device memory does not outlive it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_pools: int,
        max_owner_pools: int,
        most_bytes: int = 2**63,
        last_epoch: int = 0,
        keep_epoch: Callable[[int], None] = lambda _: None,
        boot_id: str,
        monotonic: Callable[[], float],
        wall: Callable[[], float],
        telemetry: Telemetry | None = None,
        model: Callable[[], Model | None] = lambda: None,
    ) -> None:
        self._directory = directory
        self._max_pools = max_pools
        self._max_owner_pools = max_owner_pools
        self._most_bytes = most_bytes
        self._last_epoch = last_epoch
        self._keep_epoch = keep_epoch
        self._boot_id = boot_id
        self._monotonic = monotonic
        self._wall = wall
        self._model = model
        self.telemetry = telemetry or Telemetry()
        self._lock = Lock()
        self._epochs = Lock()  # taken last, for a moment
        self._entries: dict[str, Entry] = {}
        self._closed = False

    def attach_all(self) -> None:
        """Attach the pools of an earlier run; log the reason for each that cannot be used."""
        for leftover in self._directory.glob(f"*{SUFFIX}{UNFINISHED}"):
            with suppress(OSError):  # a new one takes its place
                leftover.unlink()
        for path in sorted(self._directory.glob(f"*{SUFFIX}")):
            try:
                self._find(path.name.removesuffix(SUFFIX))
            except PoolNotFoundError:
                pass  # set aside, and logged
            except (OdmaError, OSError) as error:
                log.error("pool left alone", file=str(path), reason=str(error))

    def close(self, within_seconds: float = READ_SECONDS) -> None:
        """Refuse new calls; give all files back after the calls that hold them.

        A pool that a call still holds at the end of that time is left to the end of the process,
        which loses nothing. Epochs go on: the next start finds them.
        """
        self._closed = True
        deadline = time.monotonic() + within_seconds
        with self._lock:  # held for nobody's call
            entries, self._entries = self._entries, {}
        for name, entry in entries.items():
            if not entry.lock.acquire(timeout=max(deadline - time.monotonic(), 0)):
                log.warning("pool in use at the end of the drain", pool=name)
                continue
            try:
                entry.give_back()
            finally:
                entry.lock.release()

    def names(self) -> list[str]:
        """Return the names of all pools that the caller may see."""
        self._insist_serving()
        pools = [(name, entry.pool) for name, entry in sorted(self._entries.items())]
        return [name for name, pool in pools if pool and may_see(pool.spec)]

    def open(
        self,
        spec: PoolSpec,
        policy: PolicyRecord,
        *,
        keep_policy: bool,
        take_over: bool,
        opening: Opening = NO_INSTANCE,
        seen: str | None = None,
    ) -> Opened:
        """Begin an epoch, in the books of an earlier one if their geometry is the same.

        While an epoch lives, its open_id gets the same epoch again. `policy` is installed,
        unless `keep_policy` is set and the pool has the policy of an engine of this kind. An
        `opening` with an instance fences the epoch; `seen` is how its sender saw the pool, if it
        says so. Raises PoolOwnedError, PoolForeignError, PoolLimitError, BooksSpaceError,
        InvalidError, BooksLockedError, StaleOpenError, FencedError, UnfencedError.
        """
        while True:
            with self._lock:
                self._insist_serving()
                entry = self._entry(spec.name)
                if entry is None:
                    spec = claimed(spec, None)
                    NOBODY.check(opening, seen, name=spec.name, owner=0, now="")
                    return self._create(spec, policy, opening)
            with entry.lock:
                if entry.pool is None:
                    continue  # forgotten, set aside or refused by the system, meanwhile
                self._insist_serving()
                with self._using(spec.name, entry) as pool:
                    spec = claimed(spec, pool.spec)
                    pool.insist_new(opening, seen)
                    try:
                        is_retry = self._is_retry(pool, spec)
                        if not is_retry:
                            self._insist_free(pool, entry, take_over=take_over)
                    except OdmaError:
                        if opening.instance:
                            pool.refuse(opening)
                        raise
                    if is_retry:
                        self._own(pool, opening)
                        self._hear(spec.name, entry)
                    else:
                        self._begin(pool, entry, spec, policy, opening, keep_policy=keep_policy)
                return _opened(entry.learner.pool)

    def close_epoch(self, name: str, caller: Caller | int, *, by_operator: bool = False) -> None:
        """End an epoch; a repeated call changes nothing. Raises EpochError for an older epoch."""
        caller = Caller.of(caller)
        entry = self._find(name)
        with entry.lock, self._using(name, entry, seen=True) as pool:
            if pool.epoch == 0 and pool.report().last_epoch == caller.epoch:
                return
            if by_operator and pool.epoch == caller.epoch:
                caller = Caller(caller.epoch)
            else:
                pool.insist(caller)
            pool.close_epoch(caller)
            self.telemetry.tell(EventKind.CLOSED, name, caller.epoch)

    def forget(self, name: str, epoch: int) -> None:
        """Remove a closed pool, whose last epoch this is. One that is gone stays gone.

        A caller who may not see the pool is told the same. Raises PoolOpenError, EpochError.
        """
        with suppress(PoolNotFoundError):
            entry = self._find(name)
            with entry.lock, self._using(name, entry, seen=True) as pool:
                if pool.report().last_epoch != epoch:
                    raise EpochError(name, epoch)
                if pool.epoch:
                    raise PoolOpenError(name)
                self._forget(name, entry)
                self.telemetry.tell(EventKind.FORGOTTEN, name, reason="by request")

    @contextmanager
    def owned(
        self, name: str, caller: Caller | int, wanted: Callable[[], bool] | None = None
    ) -> Iterator[Learner]:
        """Hold a pool for a call of its owner, and use up its number if it is refused.

        `wanted` says whether anybody waits for the answer. Raises PoolNotFoundError,
        EpochError, FencedError, UnfencedError, and UnavailableError if nobody does.
        """
        caller = Caller.of(caller)
        entry = self._hold(name, wanted)
        try:
            with self._using(name, entry, seen=True) as pool:
                pool.insist(caller)
                self.telemetry.spans.serves(name, caller.epoch)
                self._hear(name, entry)
                try:
                    yield entry.learner
                except FINAL:
                    if caller.owner:
                        pool.spend(caller)
                    raise
        finally:
            entry.lock.release()

    @contextmanager
    def steered(
        self, name: str, epoch: int, wanted: Callable[[], bool] | None = None
    ) -> Iterator[Learner]:
        """Hold a pool for a call that its policy's version fences, whoever makes it.

        It is no sign of life of an owner that has a number. Raises as `owned` does.
        """
        entry = self._hold(name, wanted)
        try:
            with self._using(name, entry, seen=True) as pool:
                if pool.epoch != epoch:
                    raise EpochError(name, epoch)
                self.telemetry.spans.serves(name, epoch)
                if not pool.owner:
                    self._hear(name, entry)
                yield entry.learner
        finally:
            entry.lock.release()

    def _hold(self, name: str, wanted: Callable[[], bool] | None) -> Entry:
        """Return a pool's entry with its lock held."""
        entry = self._find(name)
        self.telemetry.spans.take(entry.lock)
        if wanted is not None and not wanted():
            entry.lock.release()
            raise UnavailableError("nobody waits for the answer any more")
        return entry

    @contextmanager
    def viewed(self, name: str) -> Iterator[View]:
        """Look at a pool, which its owner goes on with.

        Whatever was answered before is seen. Raises PoolNotFoundError, UnavailableError.
        """
        entry = self._find(name)
        if not entry.reading.acquire(timeout=READ_SECONDS):
            raise UnavailableError(f"many look at pool {name!r}; try again")
        try:
            pool = self._pool_of(name, entry, seen=True)
            if entry.shown is None:
                entry.shown = Learner(pool, model=self._model)
            yield View(entry.shown, self._idle_seconds(entry))
        except (BooksCorruptError, MemoryError) as error:
            failed: Exception | None = error
        else:
            failed = None
        finally:
            entry.reading.release()
        if failed:
            with entry.lock, self._using(name, entry):
                raise failed

    def reap(self, now: float | None = None, *, missed_seconds: float = 0.0) -> None:
        """Report owners that fell silent, and close their pools after the retention time.

        Nothing else closes them: a call is heard, however late it is taken. A pool in use is
        skipped, as its owner is not silent. `now` is when the caller looked at the clock. For
        `missed_seconds` before that the process did not run, so nobody can have been heard.
        """
        now = self._monotonic() if now is None else now
        for name, entry in list(self._entries.items()):
            if not entry.lock.acquire(blocking=False):
                continue
            try:
                entry.heard_at = max(entry.heard_at, min(entry.heard_at + missed_seconds, now))
                if entry.pool is not None:
                    with suppress(BooksError), self._using(name, entry) as pool:
                        self._look_at(pool, entry, now - entry.heard_at)
            finally:
                entry.lock.release()

    def _look_at(self, pool: Pool, entry: Entry, idle_seconds: float) -> None:
        name, epoch = pool.spec.name, pool.epoch
        if epoch and idle_seconds > pool.spec.retention_seconds:
            pool.close_epoch(epoch)
            self.telemetry.tell(EventKind.EXPIRED, name, epoch)
        elif epoch and not entry.stale and idle_seconds > pool.spec.ttl_seconds:
            entry.stale = True
            self.telemetry.tell(EventKind.STALE, name, epoch)

    # --- the set of pools ---

    def _find(self, name: str) -> Entry:
        """Return a pool's entry. Raises PoolNotFoundError."""
        entry = self._entries.get(name)
        if entry is None:
            with self._lock:
                self._insist_serving()
                entry = self._entry(name)
        if entry is None:
            raise PoolNotFoundError(name)
        return entry

    def _entry(self, name: str) -> Entry | None:
        """Return a pool's entry, or attach its file, which another process may have given up."""
        entry = self._entries.get(name)
        path = self._path(name)
        if entry is not None or not _may_exist(path):
            return entry
        try:
            pool = self._attach(name, path)
        except UNUSABLE as error:
            self._set_aside(name, error)
            return None
        except PoolNotFoundError:
            return None
        self._last_epoch = max(self._last_epoch, pool.report().last_epoch)
        self._entries[name] = entry = Entry(self._learner(pool), self._monotonic())
        if pool.report().rebooted:
            log.warning("epoch over: the machine was started anew", pool=name)
        if pool.epoch:
            self.telemetry.tell(
                EventKind.RESUMED, name, pool.epoch, reason=f"batch {pool.last_seq} was the last"
            )
        return entry

    def _learner(self, pool: Pool, before: Pool | None = None) -> Learner:
        try:
            return Learner(pool, self.telemetry.observer_of(pool), model=self._model)
        except MemoryError:
            if pool is not before:  # that one may have readers
                pool.close()  # its file can be attached again
            raise

    def _attach(self, name: str, path: Path) -> Pool:
        pool = Pool.attach(path, self._boot_id)
        if pool.spec.name == name:
            return pool
        pool.close()
        raise BooksMismatchError(f"{path}: its books are those of pool {pool.spec.name!r}")

    @contextmanager
    def _using(self, name: str, entry: Entry, *, seen: bool = False) -> Iterator[Pool]:
        """Use the pool of a locked entry; read its file again if its books fail.

        Raises as _pool_of does.
        """
        pool = self._pool_of(name, entry, seen=seen)
        try:
            yield pool
        except (BooksCorruptError, MemoryError) as error:
            raise self._renew(name, entry, str(error) or "no memory is left") from None

    def _pool_of(self, name: str, entry: Entry, *, seen: bool) -> Pool:
        """Return the pool of an entry.

        Raises PoolNotFoundError, if `seen` also for a pool that the caller may not see.
        """
        pool = entry.pool
        if seen or pool is None:
            self._insist_serving()
        if pool is None:
            raise entry.trouble or PoolNotFoundError(name)
        if seen and not may_see(pool.spec):
            raise PoolNotFoundError(name)
        return pool

    def _hear(self, name: str, entry: Entry) -> None:
        """Record that the owner of a locked entry lives."""
        entry.heard_at = self._monotonic()
        if entry.stale:
            entry.stale = False
            self.telemetry.tell(EventKind.REVIVED, name, entry.learner.pool.epoch)

    def _insist_serving(self) -> None:
        if self._closed:
            raise draining()

    def _renew(self, name: str, entry: Entry, reason: str) -> OdmaError:
        """Read the file of a locked entry again, as after a kill; return what to tell its caller.

        Books that are set aside can be opened anew.
        """
        entry.give_back()
        try:
            pool = self._attach(name, self._path(name))
            entry.adopt(self._learner(pool), entry.heard_at)
        except UNUSABLE as fault:
            self._entries.pop(name, None)
            self._set_aside(name, fault)
            return fault
        except PoolNotFoundError:
            self._entries.pop(name, None)
            return BooksCorruptError(reason)
        except (BooksError, MemoryError) as refused:
            self._entries.pop(name, None)
            entry.trouble = BooksUnavailableError(str(refused) or reason)
            return entry.trouble
        return BooksUnavailableError(f"{reason}; the file was read again: repeat the call")

    def _set_aside(self, name: str, error: BooksError) -> None:
        try:
            aside = set_aside(self._path(name), str(error))
        except OSError as refused:
            reason = f"{error}; it cannot be set aside: {refused.strerror}"
            raise BooksUnavailableError(reason) from None
        self.telemetry.tell(EventKind.SET_ASIDE, name, reason=str(error), file=str(aside))

    @contextmanager
    def _room_for(self, owner: str) -> Iterator[str | None]:
        """Hold the closed pool that was opened longest ago, if a limit is reached, and name it.

        An owner at its own limit makes room among its own pools. Raises PoolLimitError.
        """
        own = {
            name: entry
            for name, entry in self._entries.items()
            if owner and entry.pool and entry.pool.spec.owner == owner
        }
        if len(own) >= self._max_owner_pools:
            with self._oldest_closed(
                own, f"{self._max_owner_pools} pools (max-owner-pools)"
            ) as name:
                yield name
        elif len(self._entries) >= self._max_pools:
            with self._oldest_closed(self._entries, f"{self._max_pools} pools (max-pools)") as name:
                yield name
        else:
            yield None

    @contextmanager
    def _oldest_closed(self, entries: Mapping[str, Entry], limit: str) -> Iterator[str]:
        closed: list[tuple[int, str]] = []
        for name, entry in entries.items():
            with _tried(entry.lock) as held:
                if held and entry.pool and not entry.pool.epoch:
                    closed.append((entry.pool.report().last_epoch, name))
        for _, name in sorted(closed):
            entry = entries[name]
            with _tried(entry.lock) as held:
                if held and entry.pool and not entry.pool.epoch:  # nobody has opened it since
                    yield name
                    return
        raise PoolLimitError(f"all {limit} are open")

    def _forget(self, name: str, entry: Entry) -> None:
        """Remove a closed pool whose lock is held. Raises OSError: it is still there."""
        self._path(name).unlink(missing_ok=True)
        entry.give_back()
        self._entries.pop(name, None)

    def _insist_bytes(self, spec: PoolSpec, without: str | None) -> None:
        """Raise PoolLimitError if the files would pass their bound, one of them being gone."""
        wanted = spec.arena_geometry().file_bytes
        pools = [(name, entry.pool) for name, entry in list(self._entries.items())]
        taken = sum(
            pool.spec.arena_geometry().file_bytes
            for name, pool in pools
            if pool is not None and name != without
        )
        if taken + wanted > self._most_bytes:
            raise PoolLimitError(
                f"its file takes {wanted:,} bytes, and those of the others {taken:,} of "
                f"{self._most_bytes:,} (max-pool-bytes); fewer max_regions take less"
            )

    # --- opening ---

    def _is_retry(self, pool: Pool, spec: PoolSpec) -> bool:
        of_another = pool.spec.owner != spec.owner or pool.spec.open_id != spec.open_id
        if not pool.epoch or of_another:
            return False
        if pool.spec != spec:
            raise InvalidError("open_id", "was used to open this pool with other fields")
        return True

    def _insist_free(self, pool: Pool, entry: Entry, *, take_over: bool) -> None:
        """Raise PoolOwnedError if somebody else owns the pool and it is not taken over."""
        if pool.epoch and not take_over:
            raise PoolOwnedError(pool.spec.name, self._idle_seconds(entry))

    def _own(self, pool: Pool, opening: Opening) -> None:
        """Make the sender of a retried OpenPool the owner. Raises UnfencedError."""
        if not opening.instance:
            if pool.owner:
                raise UnfencedError(pool.spec.name, pool.owner)
            return
        before = pool.openers.owner.instance
        pool.own(opening)
        if before not in ("", opening.instance):
            self.telemetry.tell(
                EventKind.SUCCEEDED,
                pool.spec.name,
                pool.epoch,
                reason=f"owner number {pool.owner}",
            )

    def _create(self, spec: PoolSpec, policy: PolicyRecord, opening: Opening) -> Opened:
        with self._room_for(spec.owner) as forgotten:
            self._insist_bytes(spec, forgotten)
            openers = NOBODY.owned_by(opening, ends_another=False)
            pool = self._new_books(spec, self._next_epoch(0), policy, openers)
            if forgotten is not None:
                try:
                    self._forget(forgotten, self._entries[forgotten])
                except OSError:
                    pool.close()
                    self._path(spec.name).unlink()
                    raise
                self.telemetry.tell(EventKind.FORGOTTEN, forgotten, reason="to make room")
        self._entries[spec.name] = Entry(self._learner(pool), self._monotonic())
        self._tell_opened(pool, f"with new books and the policy {policy.name}")
        return _opened(pool)

    def _begin(
        self,
        pool: Pool,
        entry: Entry,
        spec: PoolSpec,
        policy: PolicyRecord,
        opening: Opening,
        *,
        keep_policy: bool,
    ) -> None:
        """Begin an epoch for a locked entry, with new books if the geometry changes."""
        before = pool.epoch
        epoch = self._next_epoch(pool.report().last_epoch)
        openers = pool.openers.owned_by(opening, ends_another=bool(pool.epoch))
        if spec.arena_geometry() != pool.spec.arena_geometry():
            self._insist_bytes(spec, spec.name)
            pool = self._new_books(spec, epoch, policy, openers)
            told = f"with new books and the policy {policy.name}"
        elif keep_policy and spec.engine_kind == pool.spec.engine_kind:
            pool.open_epoch(spec, epoch, self._boot_id, None, openers)
            told = f"its policy, {pool.policy().name}, goes on"
        else:
            former = pool.policy()
            if keep_policy:  # the tenants are the operator's, not the engine's
                safety_share = min(policy.safety_share, former.unguaranteed_share)
                policy = policy.with_changes(tenants=former.tenants, safety_share=safety_share)
            pool.open_epoch(spec, epoch, self._boot_id, policy, openers)
            why = "the engine is of another kind" if keep_policy else "as asked for"
            told = f"policy {policy.name} in the place of {former.name}: {why}"
        if before:
            self.telemetry.tell(EventKind.TAKEN_OVER, spec.name, before)
        entry.adopt(self._learner(pool, entry.pool), self._monotonic())
        self._tell_opened(pool, told)

    def _tell_opened(self, pool: Pool, reason: str) -> None:
        self.telemetry.tell(EventKind.OPENED, pool.spec.name, pool.epoch, reason=reason)

    def _new_books(
        self, spec: PoolSpec, epoch: int, policy: PolicyRecord, openers: Openers
    ) -> Pool:
        """Make books in the place of the pool's file, if there is one: if that fails it stays."""
        path = self._path(spec.name)
        unfinished = path.with_name(path.name + UNFINISHED)
        unfinished.unlink(missing_ok=True)  # of an attempt that failed
        try:
            pool = Pool.create(unfinished, spec, epoch, self._boot_id, policy, openers)
        except BooksSpaceError as error:  # its message names the file, for the log alone
            self.telemetry.tell(EventKind.NO_ROOM, spec.name, reason=str(error))
            room = f"{spec.arena_geometry().file_bytes:,} bytes"
            raise BooksSpaceError(f"the pool directory has no room for its file, {room}") from None
        except BooksCorruptError as error:  # a page of it failed: there are no books yet
            raise BooksUnavailableError(str(error)) from None
        try:
            unfinished.replace(path)
        except OSError:
            pool.close()
            unfinished.unlink()
            raise
        return pool

    def _next_epoch(self, last: int) -> int:
        """Return a number that no epoch had before, in lost books and by other clocks either."""
        with self._epochs:
            epoch = max(int(self._wall() * 1000), last + 1, self._last_epoch + 1)
            self._keep_epoch(epoch)
            self._last_epoch = epoch
        return epoch

    def _idle_seconds(self, entry: Entry) -> float:
        return self._monotonic() - entry.heard_at

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}{SUFFIX}"


def _may_exist(path: Path) -> bool:
    """Whether a file is there, or nobody can say."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def _tried(lock: Lock) -> Iterator[bool]:
    """Hold a lock if nobody else does; tell whether it is held."""
    held = lock.acquire(blocking=False)
    try:
        yield held
    finally:
        if held:
            lock.release()


def draining() -> UnavailableError:
    """Return the error of every call while the service drains."""
    return UnavailableError("the service is draining; try again")


def _opened(pool: Pool) -> Opened:
    policy = pool.policy()
    return Opened(pool.spec, pool.epoch, pool.owner, policy.version, policy.name)
