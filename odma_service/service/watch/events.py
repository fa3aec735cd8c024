"""Events of pools: written to the log, and kept for a while for Watch.

Each event has a cursor, one more than that of the event before. Cursors belong to one
incarnation, a run of the service. Only the last KEPT events are kept: a reader that comes back
later has lost some, and its answer says so.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter, deque
from collections.abc import Callable
from enum import IntEnum
from itertools import islice
from threading import Condition
from typing import NamedTuple

import structlog

KEPT = 4096

log = structlog.get_logger()


class EventKind(IntEnum):
    """Kinds of events, numbered as in the proto."""

    OPENED = 1
    RESUMED = 2
    TAKEN_OVER = 3
    CLOSED = 4
    STALE = 5
    REVIVED = 6
    SET_ASIDE = 7
    FORGOTTEN = 8
    POLICY_SET = 9
    RECALIBRATED = 10
    SAFETY_SHARE = 11
    EXPIRED = 12
    SUCCEEDED = 13
    NO_ROOM = 14


ENDS_EPOCH = {
    EventKind.TAKEN_OVER,
    EventKind.CLOSED,
    EventKind.EXPIRED,
    EventKind.SET_ASIDE,
    EventKind.FORGOTTEN,
}

_LINES = {
    EventKind.OPENED: ("info", "pool opened"),
    EventKind.RESUMED: ("info", "pool found"),
    EventKind.TAKEN_OVER: ("warning", "pool taken over"),
    EventKind.CLOSED: ("info", "pool closed"),
    EventKind.EXPIRED: ("warning", "pool closed: its owner is silent"),
    EventKind.SUCCEEDED: ("warning", "owner succeeded by another instance"),
    EventKind.STALE: ("warning", "pool stale: its owner is silent"),
    EventKind.REVIVED: ("info", "pool revived: its owner is back"),
    EventKind.SET_ASIDE: ("error", "pool set aside"),
    EventKind.NO_ROOM: ("error", "no room for the books of a pool"),
    EventKind.FORGOTTEN: ("info", "pool forgotten"),
    EventKind.POLICY_SET: ("info", "policy set"),
    EventKind.RECALIBRATED: ("info", "bucket limits recalibrated"),
    EventKind.SAFETY_SHARE: ("debug", "safety share adapted"),
}


class Event(NamedTuple):
    """One event. epoch, policy_version: 0 if the event is about none. reason: for people.

    owner: the identity that may see the pool; empty where callers need none.
    """

    cursor: int
    kind: EventKind
    pool: str
    epoch: int
    unix_seconds: float
    reason: str
    policy_version: int
    owner: str


class Missed(NamedTuple):
    """The events behind a reader's cursor, and whether some before them are lost."""

    events: list[Event]
    lost: bool


class Events:
    """The last events of all pools. Any thread may add or read them."""

    def __init__(self, wall: Callable[[], float] = time.time, kept: int = KEPT) -> None:
        self.incarnation = uuid.uuid4().hex
        self._wall = wall
        self._kept: deque[Event] = deque(maxlen=kept)
        self._last = 0
        self._counts: Counter[EventKind] = Counter()
        self._news = Condition()
        self._over = False

    def tell(
        self,
        kind: EventKind,
        pool: str,
        epoch: int = 0,
        *,
        reason: str = "",
        policy_version: int = 0,
        owner: str = "",
        file: str = "",
    ) -> None:
        """Keep an event, then log it, without a wait for readers. `file`: for the log line only."""
        known = {"epoch": epoch, "policy_version": policy_version, "reason": reason, "file": file}
        level, line = _LINES[kind]
        told = {name: value for name, value in known.items() if value}
        with self._news:
            self._last += 1
            self._counts[kind] += 1
            self._kept.append(
                Event(self._last, kind, pool, epoch, self._wall(), reason, policy_version, owner)
            )
            self._news.notify_all()
        getattr(log, level)(line, kind=kind.name, pool=pool, **told)

    def end(self) -> None:
        """Wake all readers: nothing follows."""
        with self._news:
            self._over = True
            self._news.notify_all()

    @property
    def over(self) -> bool:
        """Whether nothing follows."""
        return self._over

    @property
    def last(self) -> int:
        """The cursor of the last event, 0 before the first."""
        return self._last

    def counts(self) -> dict[EventKind, int]:
        """Return the number of events of each kind in this incarnation."""
        with self._news:
            return {kind: self._counts[kind] for kind in EventKind}

    def after(self, cursor: int, wait_seconds: float = 0.0) -> Missed:
        """Return the events behind `cursor`; wait up to `wait_seconds` for the first."""
        with self._news:
            self._news.wait_for(lambda: self._over or self._last > cursor, wait_seconds)
            oldest = self._last - len(self._kept) + 1
            behind = islice(self._kept, max(cursor + 1 - oldest, 0), None)
            return Missed(list(behind), lost=cursor + 1 < oldest)
