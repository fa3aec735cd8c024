"""An engine of a server that is killed: it makes every kind of call that changes books.

What it asked and was not answered is in doubt: the books must show it done wholly or not at all,
and asked again it is answered as if it had been asked once.
"""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import dataclass

from lab.robustness.engine import Engine
from lab.robustness.twin import Findings, Held, Twin
from odma_service.client import Client
from odma_service.errors import RefusedError, UnavailableError
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.values import Allocate, Extend, Free, Op, Trim
from odma_service.wire import place_from

ALONE_SHARE, RECONCILE_SHARE, OPEN_SHARE = 0.3, 0.06, 0.02  # of all calls; the rest are batches
MOST_LEFT_OUT = 3  # by a reconciliation


@dataclass(frozen=True)
class Reconcile:
    """All other regions are freed."""

    kept: tuple[int, ...]


@dataclass(frozen=True)
class Open:
    """A new epoch. A second time, the same one."""

    open_id: str


Call = Op | Reconcile | Open


class Victim(Engine):
    """An engine that is in doubt of at most one call."""

    def __init__(
        self, service: Client, name: str, seed: int, *, single_stream: bool, granule_tokens: int
    ) -> None:
        super().__init__(
            service, name, seed, single_stream=single_stream, granule_tokens=granule_tokens
        )
        self.calls: Counter[str] = Counter()  # that were answered
        self.reused_tokens = 0
        self._keyed: tuple[Twin, dict[int, int]] | None = None  # as listed with that twin
        self._doubt: Call | None = None

    def work(self, target: str) -> None:
        """Make calls until there is no answer."""
        with Client(target, retry_seconds=0) as service:
            self.use(service)
            try:
                while True:
                    self._next(service)
            except UnavailableError:
                return

    def _next(self, service: Client) -> None:
        if self._load.granule_tokens:
            self._keyed = self._twin, _keyed(service.list_regions(self.name))
        chance = self._random.random()
        if chance < OPEN_SHARE:
            self._make(service, Open(uuid.uuid4().hex))
        elif chance < OPEN_SHARE + RECONCILE_SHARE:
            held = list(self._twin.held)
            gone = set(self._random.sample(held, min(len(held), MOST_LEFT_OUT)))
            self._make(service, Reconcile(tuple(handle for handle in held if handle not in gone)))
        elif chance < OPEN_SHARE + RECONCILE_SHARE + ALONE_SHARE:
            op = self._load.alone(self._twin)
            if not isinstance(op, Trim):  # which only a batch can do
                self._make(service, op)
        else:
            self.step()
            self.calls["Apply"] += 1

    def _make(self, service: Client, call: Call) -> object:
        """Make a call and believe the answer, which is returned for comparison."""
        self._doubt = call
        answer = self._ask(service, call)
        self._doubt = None
        self.acknowledged += 1
        self.calls[type(call).__name__] += 1
        return answer

    def _ask(self, service: Client, call: Call) -> object:
        held = self._twin.held
        try:
            match call:
                case Allocate():
                    place = Held(call.request_id, *self.pool.allocate(call)[:3])
                    self._twin = Twin({**held, place.handle: place})
                    return place
                case Extend():
                    name = held[call.handle].request_id
                    place = Held(name, *self.pool.extend(call)[:3])
                    self._twin = Twin({**held, place.handle: place})
                    return place
                case Free():
                    again = self.pool.free(call).already_free
                    self._twin = Twin({h: held[h] for h in held if h != call.handle})
                    return again
                case Reconcile():
                    told = self.pool.reconcile(list(call.kept))
                    self._twin = Twin({handle: held[handle] for handle in call.kept})
                    places = [Held(held[p.handle].request_id, *p[:3]) for p in told.kept]
                    return places, set(told.freed)
                case Open():
                    self._how["open_id"] = call.open_id
                    self.pool = service.open_pool(self.name, take_over=True, **self._how)
                    self._twin, self._last = Twin(), None
                    return self.pool.ref.epoch
        except RefusedError:
            return None
        raise TypeError(call)

    # After a kill

    def examine(self, service: Client, findings: Findings) -> None:
        """Hold the books of a service that was started again against the twin."""
        call, self._doubt = self._doubt, None
        if call is None:
            super().examine(service, findings)
            return
        self.use(service)
        facts, regions = service.get_pool(self.name), service.list_regions(self.name)
        where = f"pool {self.name}, {type(call).__name__} after seq {self.pool.seq}"
        live = self._live(regions)
        before, epoch = self._twin, self.pool.ref.epoch
        if isinstance(call, Open) and facts.summary.pool.epoch != epoch:
            self._twin, expected_seq = Twin(), 0
        else:
            self._twin, expected_seq = _done(before, call, live), self.pool.seq
        done = self._twin is not before
        if facts.last_seq != expected_seq:
            findings.note("lost", f"{where}: the books are at seq {facts.last_seq}")
            return
        self._compare(where, facts, regions, findings)
        if not isinstance(call, Open):
            self._ask_again(where, service, findings)
        expected = _answer(call, before, self._twin, facts, done=done)
        if isinstance(call, Reconcile):
            self._twin = before  # whose words the answer is told in
        answer = self._make(service, call)
        if (done or isinstance(call, Free | Reconcile)) and answer != expected:
            findings.note("wrong_replays", f"{where}: {call} again: {answer}, not {expected}")

    def _compare(
        self,
        where: str,
        facts: pool_pb.GetPoolResponse,
        regions: list[pool_pb.Region],
        findings: Findings,
    ) -> None:
        """After a call that was not done, keys stand as before it."""
        super()._compare(where, facts, regions, findings)
        self.reused_tokens = facts.reuse.reused_tokens
        if self._keyed is None:
            return
        (twin, before), keyed = self._keyed, _keyed(regions)
        if twin is self._twin and keyed != before:
            wrong = sorted(keyed.items() ^ before.items())
            findings.note("lost", f"{where}: keys stand otherwise for {wrong}")

    def _live(self, regions: list[pool_pb.Region]) -> dict[int, Held]:
        live = [region for region in regions if region.state == pool_pb.REGION_STATE_LIVE]
        held = [Held(region.request_id, *place_from(region.place)[:3]) for region in live]
        return {region.handle: region for region in held}


def _keyed(regions: list[pool_pb.Region]) -> dict[int, int]:
    """Return for how many tokens of each region or kept run keys stand."""
    found = {region.place.handle: region.shareable_tokens for region in regions}
    return {handle: tokens for handle, tokens in found.items() if tokens}


def _done(twin: Twin, call: Call, live: dict[int, Held]) -> Twin:
    """Return the twin after a call if the books show it done, else the twin itself."""
    held = twin.held
    match call:
        case Allocate():
            new = {h: place for h, place in live.items() if place.request_id == call.request_id}
            return Twin({**held, **new}) if new else twin
        case Extend():
            now = live.get(call.handle)
            if now is None or now.length_tokens <= held[call.handle].length_tokens:
                return twin
            grown = held[call.handle]._replace(length_tokens=now.length_tokens)
            return Twin({**held, call.handle: grown})
        case Free() if call.handle not in live:
            return Twin({h: held[h] for h in held if h != call.handle})
        case Reconcile() if not (held.keys() - set(call.kept)) & live.keys():
            return Twin({handle: held[handle] for handle in call.kept})
    return twin


def _answer(
    call: Call, before: Twin, now: Twin, facts: pool_pb.GetPoolResponse, *, done: bool
) -> object:
    """Return what a call is answered that is asked again; of some only where it was done."""
    match call:
        case Free():
            return done
        case Reconcile():
            places = [before.held[handle] for handle in call.kept]
            return places, set() if done else before.held.keys() - set(call.kept)
        case Allocate():
            return next((p for p in now.held.values() if p.request_id == call.request_id), None)
        case Extend():
            return now.held[call.handle]
        case _:
            return facts.summary.pool.epoch
