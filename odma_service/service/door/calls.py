"""Calls: threads for calls, shared out fairly among callers.

A caller is an identity, or a connection where callers need none. A certificate is seen in the first
call of a connection, and makes the next ones its identity's. Each caller has a queue and a bound of
threads; queues take turns. grpcio gives a call its thread before its message has come:
so a call may hold a thread for as long as its client is silent. While others wait for a thread,
the calls that have been silent longest are cut.

Calls of a rpc that only reads can be paced: a caller that has used up its time waits, in the
queue and without a thread, until it has some again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context
from functools import partial
from queue import SimpleQueue
from time import monotonic, thread_time
from typing import Any, NamedTuple

import structlog

from odma_service.service.door.access import CALLER

SILENT_SECONDS = 0.5
"""A call whose message has not come after so long makes way for calls that wait."""
SWEEP_SECONDS = 0.02
BUSY_SECONDS = 1.0
MOST_CONNECTIONS = 4096
"""Connections whose certificates are remembered."""

_HERE = threading.local()

log = structlog.get_logger()


class Pace(NamedTuple):
    """How much of a processor a caller may use: seconds in a second, and seconds at once.

    Callers without a name share this at one address. It holds while `busy` says that a caller
    at another connection is at work.
    """

    share: float
    burst_seconds: float
    call_seconds: float
    """What a call costs beside its handler, paid when it begins."""
    busy: Callable[[Hashable], bool]


class Busy:
    """Who was at work lately."""

    def __init__(self) -> None:
        self._last: tuple[Hashable, float] = (None, 0.0)
        self._other: tuple[Hashable, float] = (None, 0.0)

    def hear(self) -> None:
        """Note that the message of this thread's call has come, and that its caller is at work."""
        call = getattr(_HERE, "call", None)
        caller = None
        if call is not None:
            call.heard, caller = True, call.caller
        last = self._last
        if last[0] != caller:
            self._other = last
        self._last = caller, monotonic()

    def with_others(self, caller: Hashable) -> bool:
        """Return whether another caller was at work within the last BUSY_SECONDS."""
        since = monotonic() - BUSY_SECONDS
        return any(then > since and who != caller for who, then in (self._last, self._other))


class Connections:
    """Whose connections are, as far as their certificates have been seen."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callers: OrderedDict[str, Hashable] = OrderedDict()

    def note(self, peer: str, caller: Hashable) -> None:
        """Note whose connection this is."""
        with self._lock:
            self._callers[peer] = caller
            self._callers.move_to_end(peer)
            if len(self._callers) > MOST_CONNECTIONS:
                self._callers.popitem(last=False)

    def caller(self, peer: str) -> Hashable:
        """Return whose connection this is: its own, if nothing is known of it."""
        return self._callers.get(peer, peer)


class _Call(Future[Any]):
    """A call that waits for a thread or has one. Its result is that it is over."""

    def __init__(self, caller: Hashable, wire: Any, work: Callable[[], object]) -> None:
        super().__init__()
        self.caller = caller
        self.work = work
        self.heard = False
        self.since = 0.0
        self.kept: Any = None
        self._wire = wire

    def cut(self) -> None:
        """End the call without an answer."""
        if self._wire is not None:
            self._wire.cancel()


class Calls(ThreadPoolExecutor):
    """The threads that answer calls, and the calls that they have or will get.

    The executor only makes the threads. Each is started once, when all others have a call, and
    answers one call after the other until the shutdown.
    """

    def __init__(
        self,
        threads: int,
        each: int | None = None,
        *,
        name: str = "call",
        pace: Pace | None = None,
        connections: Connections | None = None,
    ) -> None:
        """Share `threads` out; a caller has at most `each` of them at a time."""
        super().__init__(threads, thread_name_prefix=name)
        self._most = threads
        self._each = each or threads
        self._pace = pace
        self._connections = connections or Connections()
        self._lock = threading.Lock()
        self._queues: OrderedDict[Hashable, deque[_Call]] = OrderedDict()
        self._ready: SimpleQueue[_Call | None] = SimpleQueue()
        """Calls that have a thread, which is on its way to them. None: the thread ends."""
        self._started = 0
        self._running: set[_Call] = set()
        self._held: dict[Hashable, int] = {}
        self._under_way: set[_Call] = set()
        self._by_caller: dict[Hashable, int] = {}
        self._used: dict[Hashable, tuple[float, float]] = {}
        """Seconds used by a caller beyond its share, and when that was so."""

    @property
    def count(self) -> int:
        """How many calls are under way."""
        return len(self._under_way)

    def count_of(self, caller: Hashable) -> int:
        """Return how many calls of a caller are under way."""
        return self._by_caller.get(caller, 0)

    def under_way(self) -> set[_Call]:
        """Return the calls under way, for a caller that waits for them."""
        with self._lock:
            return self._under_way.copy()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> _Call:
        """Run a call as soon as its caller may have a thread and one is free."""
        wire = _wire_of(args)
        caller = _identity_of(fn)
        if caller is None and wire:
            caller = self._connections.caller(wire.peer().decode())
        call = _Call(caller, wire, partial(fn, *args, **kwargs))
        with self._lock:
            self._under_way.add(call)
            self._by_caller[caller] = self._by_caller.get(caller, 0) + 1
            if not self._queues and self._may_begin(caller):
                self._begin(call)
            else:
                self._queues.setdefault(caller, deque()).append(call)
                self._give_threads()
        return call

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Give the threads back after the calls that have one."""
        with self._lock:
            self._queues.clear()
            for _ in range(self._started):
                self._ready.put(None)
            self._started = 0
        super().shutdown(wait, cancel_futures=cancel_futures)

    def sweep(self) -> int:
        """Cut silent calls if others wait or few threads are free; let paced callers go on.

        Returns how many were cut.
        """
        with self._lock:
            self._give_threads()
            wanted = max(
                sum(map(len, self._queues.values())), len(self._running) - self._most * 7 // 8
            )
            old = monotonic() - SILENT_SECONDS
            silent = [call for call in self._running if not call.heard and call.since < old]
        silent.sort(key=lambda call: call.since)
        cut = silent[: max(wanted, 0)]
        for call in cut:
            call.cut()
        return len(cut)

    def _give_threads(self) -> None:
        """Give free threads to callers in turn. The lock is held."""
        skipped = 0
        while skipped < len(self._queues) and len(self._running) < self._most:
            caller, queue = next(iter(self._queues.items()))
            self._queues.move_to_end(caller)
            if not self._may_begin(caller):
                skipped += 1
                continue
            skipped = 0
            call = queue.popleft()
            if not queue:
                del self._queues[caller]
            self._begin(call)

    def _may_begin(self, caller: Hashable) -> bool:
        return (
            len(self._running) < self._most
            and self._held.get(caller, 0) < self._each
            and self._in_pace(caller)
        )

    def _begin(self, call: _Call) -> None:
        """Give a call a thread. The lock is held."""
        self._running.add(call)
        self._held[call.caller] = self._held.get(call.caller, 0) + 1
        if self._pace:
            self._charge(call.caller, self._pace.call_seconds)
        call.since = monotonic()
        if len(self._running) > self._started:
            super().submit(self._work)
            self._started += 1
        self._ready.put(call)

    def _work(self) -> None:
        """Answer calls, in a thread, until the shutdown. Between two it keeps nothing of them."""
        while self._answer(self._ready.get()):
            pass

    def _answer(self, call: _Call | None) -> bool:
        if call is None:
            return False
        _HERE.call = call
        begun = thread_time() if self._pace else 0.0
        error: BaseException | None = None
        try:
            call.work()
        except BaseException as raised:  # noqa: BLE001  it belongs to whoever asks the future
            raised.__traceback__ = None  # or its frames keep the call
            error = raised
        _HERE.call = None
        with self._lock:
            self._running.discard(call)
            _take_off(self._held, call.caller)
            _take_off(self._by_caller, call.caller)
            self._under_way.discard(call)
            if self._pace:
                self._charge(call.caller, thread_time() - begun)
            if self._queues:
                self._give_threads()
        if error:
            call.set_exception(error)
        else:
            call.set_result(None)
        return True

    def _in_pace(self, caller: Hashable) -> bool:
        pace = self._pace
        return (
            pace is None
            or self._beyond(_payer(caller)) < pace.burst_seconds
            or not pace.busy(caller)
        )

    def _beyond(self, caller: Hashable) -> float:
        """Return the seconds that a caller used beyond its share."""
        assert self._pace is not None
        used, then = self._used.get(caller, (0.0, 0.0))
        return max(0.0, used - (monotonic() - then) * self._pace.share)

    def _charge(self, caller: Hashable, seconds: float) -> None:
        payer = _payer(caller)
        self._used[payer] = (self._beyond(payer) + seconds, monotonic())
        if len(self._used) > 1024:  # forget those who have paid
            self._used = {one: used for one, used in self._used.items() if self._beyond(one) > 0.0}


def hear() -> None:
    """Note that the message of this thread's call has come."""
    call = getattr(_HERE, "call", None)
    if call is not None:
        call.heard = True


def keep(value: object) -> None:
    """Keep a value until the call of this thread is over.

    A thread that kept it itself would keep the call too, and its place in the connection.
    """
    call = getattr(_HERE, "call", None)
    if call is not None:
        call.kept = value


def kept() -> Any:
    """Return what is kept for the call of this thread, None without any."""
    return getattr(getattr(_HERE, "call", None), "kept", None)


def _payer(caller: Hashable) -> Hashable:
    """Return whose pace it is: a connection's is that of its address."""
    return caller.rpartition(":")[0] if isinstance(caller, str) else caller


def _take_off(counts: dict[Hashable, int], caller: Hashable) -> None:
    if counts[caller] == 1:
        del counts[caller]
    else:
        counts[caller] -= 1


@contextmanager
def sweeping(
    *sweeps: Callable[[], int], cut: Callable[[int], object] = lambda _: None
) -> Iterator[None]:
    """Call each of these every SWEEP_SECONDS, in a thread, for as long as the context lasts.

    `cut` learns how many calls were cut.
    """
    stop = threading.Event()

    def sweep() -> None:
        while not stop.wait(SWEEP_SECONDS):
            for one in sweeps:
                try:
                    cut(one())
                except Exception:
                    log.exception("a sweep of the calls failed; it goes on")

    thread = threading.Thread(target=sweep, name="sweep", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# --- what grpcio hands over with a call; no other module knows ---


def _wire_of(args: tuple[Any, ...]) -> Any:
    """Return the call itself, None if grpcio has changed: then silent calls are not cut."""
    for arg in args:
        if hasattr(arg, "call_details"):
            return arg.call
    return None


def _identity_of(run: Any) -> Hashable:
    """Return the identity that the call's context knows, by its token."""
    context = getattr(run, "__self__", None)
    identity = context.get(CALLER) if isinstance(context, Context) else None
    return identity.who if identity else None
