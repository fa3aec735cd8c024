"""Each harm that the model finds in the old way, played against a real service through the proxy.

Every message of the model's way is sent and held back, and delivered when the way says so. Without
instance and numbers the harm is seen: today's clients are not protected. With them it is not.
"""

from __future__ import annotations

import grpc
import pytest
from fencing_model import LEAKED, REFUSED, REVIVED, SHARED, TAKEN, UNCOPIED, Event, search
from servers import GEOMETRY, books, open_pool, places_of
from test_fencing_model import FAULTS

from lab.robustness.proxy import Fate, Message, Proxy
from odma_service.client import Client
from odma_service.errors import FencedError, OdmaError, UnavailableError
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.rpc.v1.memory_service_pb2_grpc import MemoryServiceStub
from odma_service.values import Allocate, End, Extend, Free

UNIT = 64  # tokens of a place
PROMPT = 48


class Owner:
    """One process of the model, and what it holds: places by handle."""

    def __init__(self, who: int, *, new: bool) -> None:
        self.instance = bytes([who + 1]) * 16 if new else b""
        self.attempt = 0
        self.pool = types.PoolRef()
        self.number = 0
        self.view: dict[int, tuple[int, int]] = {}
        self.closed = False
        self.waits = False


class Script:
    """Plays a way, and finds what harm it does."""

    def __init__(self, proxy: Proxy, service: Client, name: str, *, new: bool) -> None:
        self._proxy = proxy
        self._channel = grpc.insecure_channel(proxy.target)
        self._stub = MemoryServiceStub(self._channel)
        self._service = service
        self._name = name
        self._new = new
        self._owners = [Owner(who, new=new) for who in (0, 1)]
        self._present = self._owners[0]
        self._sent: dict[object, list[Message]] = {}
        self._handles: dict[int, int] = {}  # of the model -> of the service
        self.harms: set[str] = set()

    def play(self, way: list[Event]) -> set[str]:
        """Return the harms of a way."""
        for event in way:
            if event.what == "sent":
                self._send(event)
            else:
                self._deliver(event)
        self._channel.close()
        self._look()
        return self.harms

    def _send(self, event: Event) -> None:
        owner = self._owners[event.message.sender]
        if event.message.rpc == "OpenPool" and event.message.sender == 1:
            first, self._present = self._owners
            owner.pool.CopyFrom(first.pool)
            owner.view = dict(first.view)
        owner.waits = True
        if event.message.rpc == "Apply" and event.message.body[0] == "move":
            self._wall_in(owner, self._handles[event.message.body[1]])
        request = self._request(event, owner)
        self._proxy.order(event.message.rpc, Fate.HOLD)
        with pytest.raises(grpc.RpcError) as lost:
            getattr(self._stub, event.message.rpc)(request)
        assert lost.value.code() is grpc.StatusCode.UNAVAILABLE
        self._sent.setdefault(event.message, []).append(self._proxy.held[-1])

    def _request(self, event: Event, owner: Owner) -> object:
        rpc, body, seq = event.message.rpc, event.message.body, event.message.seq
        if rpc == "OpenPool":
            open_id, take_over = body
            return self._opening(owner, str(open_id), take_over=take_over)
        pool = self._ref(owner)
        if rpc == "ClosePool":
            return pb.ClosePoolRequest(pool=pool)
        if rpc == "Allocate":
            return pb.AllocateRequest(pool=pool, allocate=_alloc(body))
        if rpc == "Free":
            freeing = pb.Freeing(handle=self._handles[body], end=pb.END_FINISHED)
            return pb.FreeRequest(pool=pool, free=freeing)
        if rpc == "Reconcile":
            handles = [self._handles[handle] for handle in body]
            promise = {"completed_seq": seq} if self._new else {}
            return pb.ReconcileRequest(pool=pool, handles=handles, **promise)
        assert rpc == "Apply"
        used = [
            pb.Used(handle=handle, used_tokens=tokens, pinned=True)
            for handle, (_, tokens) in owner.view.items()
            if body[0] == "place" or handle != self._handles[body[1]]
        ]
        ops = self._ops(*body)
        return pb.ApplyRequest(pool=pool, seq=seq, completed_seq=seq - 1, used=used, ops=ops)

    def _ref(self, owner: Owner) -> types.PoolRef:
        """Return what the owner's next message carries."""
        pool = types.PoolRef()
        pool.CopyFrom(owner.pool)
        if self._new:
            owner.number += 1
            pool.number = owner.number
        return pool

    def _wall_in(self, owner: Owner, handle: int) -> None:
        """Put a region right behind another, so that it has to move to grow."""
        start, length = owner.view[handle]
        for place in [self._allocated(owner, f"wall {other}") for other in range(3)]:
            if place.start_token == start + length:
                owner.view[place.handle] = place.start_token, place.length_tokens
            else:
                freeing = pb.Freeing(handle=place.handle, end=pb.END_ABORTED)
                self._stub.Free(pb.FreeRequest(pool=self._ref(owner), free=freeing))

    def _allocated(self, owner: Owner, request_id: str) -> types.Place:
        request = pb.AllocateRequest(pool=self._ref(owner), allocate=_alloc(request_id))
        return self._stub.Allocate(request).place

    def _opening(self, owner: Owner, open_id: str, *, take_over: bool) -> pb.OpenPoolRequest:
        request = pb.OpenPoolRequest(
            open_id=open_id,
            name=self._name,
            geometry=GEOMETRY,
            capacity_tokens=4 * UNIT,
            model_length_tokens=4 * UNIT,
            moves=types.MOVES_ANY,
            single_ordered_stream=True,
            copies_may_overlap=True,
            policy=types.PolicyChange(
                name="elastic", step_tokens=16, safety_share=0, max_copy_tokens=4096
            ),
            take_over=take_over,
        )
        if self._new:
            owner.attempt += 1
            request.instance, request.attempt = owner.instance, owner.attempt
        return request

    def _ops(self, what: str, which: int) -> list[pb.Op]:
        if what == "place":
            return [pb.Op(allocate=_alloc(which))]
        return [pb.Op(extend=pb.Extend(handle=self._handles[which], least_tokens=2 * UNIT))]

    def _deliver(self, event: Event) -> None:
        messages = self._sent[event.message]
        code, answer = (messages[0] if event.late else messages[-1]).deliver()
        if event.what == "answered":
            self._hear(event, self._owners[event.message.sender], code, answer)

    def _hear(self, event: Event, owner: Owner, code: grpc.StatusCode, answer: bytes) -> None:
        rpc = event.message.rpc
        owner.waits = False
        if code is not grpc.StatusCode.OK:
            if rpc == "Reconcile" and event.message.body and self._new:
                self._keep_nothing(owner)
            elif owner is self._present:
                self.harms.add(REFUSED)
        elif rpc == "OpenPool":
            opened = pb.OpenPoolResponse.FromString(answer).pool
            if opened.epoch != owner.pool.epoch:
                if owner.view and not event.message.sender:
                    self.harms.add(TAKEN)
                owner.view = {}
            owner.pool, owner.number, owner.closed = opened, 0, False
        elif rpc == "ClosePool":
            owner.view, owner.closed = {}, True
        elif rpc == "Allocate":
            self._place(event, owner, pb.AllocateResponse.FromString(answer).place)
        elif rpc == "Free":
            owner.view.pop(self._handles[event.message.body], None)
        elif rpc == "Reconcile":
            self._keep(owner, pb.ReconcileResponse.FromString(answer))
        else:
            for result in pb.ApplyResponse.FromString(answer).results:
                self._place(event, owner, result.place)

    def _place(self, event: Event, owner: Owner, place: types.Place) -> None:
        self._handles.setdefault(event.answer[1], place.handle)
        start, length = place.start_token, place.length_tokens
        for handle, (other, tokens) in owner.view.items():
            if handle != place.handle and start < other + tokens and other < start + length:
                self.harms.add(SHARED)
        owner.view[place.handle] = start, length

    def _keep(self, owner: Owner, answer: pb.ReconcileResponse) -> None:
        kept = {one.handle: (one.start_token, one.length_tokens) for one in answer.kept}
        if any(owner.view.get(handle, place)[0] != place[0] for handle, place in kept.items()):
            self.harms.add(UNCOPIED)
        owner.view = kept

    def _keep_nothing(self, owner: Owner) -> None:
        request = pb.ReconcileRequest(pool=self._ref(owner))
        self._keep(owner, self._stub.Reconcile(request))

    def _look(self) -> None:
        """Hold what the present owner knows against the books."""
        owner = self._present
        summary = self._service.get_pool(self._name).summary
        is_open = summary.state != pool_pb.POOL_STATE_CLOSED
        if owner.closed:
            self.harms |= {REVIVED} if is_open else set()
            return
        books = {
            region.place.handle: (region.place.start_token, region.place.length_tokens)
            for region in self._service.list_regions(self._name)
            if region.state == pool_pb.REGION_STATE_LIVE
        }
        if not is_open or summary.pool.epoch != owner.pool.epoch:
            self.harms.add(TAKEN)
        elif not owner.waits:
            self.harms |= {TAKEN} if owner.view.items() - books.items() else set()
            self.harms |= {LEAKED} if books.keys() - owner.view.keys() else set()


def _alloc(request: object) -> pb.Alloc:
    return pb.Alloc(request_id=str(request), prompt_tokens=PROMPT)


def play(server, fault, *, new):
    frame, harm = FAULTS[fault]
    way = search(frame._replace(harms=(harm,)), first=True).ways[harm]
    print(*way, sep="\n")
    with Proxy(server.target) as proxy, Client(server.target) as service:
        name = f"{fault} {'new' if new else 'old'}".replace(" ", "-").replace(",", "")
        return harm, Script(proxy, service, name, new=new).play(way)


@pytest.mark.parametrize("fault", FAULTS)
def test_clients_without_numbers_are_not_protected_from(fault, server):
    harm, harms = play(server, fault, new=False)
    assert harm in harms


@pytest.mark.parametrize("fault", FAULTS)
def test_clients_with_numbers_are_protected_from(fault, server):
    _, harms = play(server, fault, new=True)
    assert harms == set()


# --- the Python client, which does all of it by itself ---


@pytest.fixture
def network(server):
    with Proxy(server.target) as proxy:
        yield proxy


def allocate(pool, request_id):
    return pool.allocate(Allocate(request_id, prompt_tokens=PROMPT))


def live(service, name):
    return set(places_of(service, name))


def test_a_reconcile_that_comes_after_its_retry_frees_nothing(network):
    with Client(network.target) as service:
        pool = open_pool(service, "late-reconcile")
        allocate(pool, "old")
        network.order("Reconcile", Fate.HOLD)
        pool.reconcile([])
        allocate(pool, "new")
        code, _ = network.held[0].deliver()
        assert code is grpc.StatusCode.ABORTED
        assert live(service, "late-reconcile") == {"new"}


def test_an_openpool_that_comes_after_the_close_opens_nothing(network):
    with Client(network.target) as service:
        network.order("OpenPool", Fate.HOLD, Fate.LOSE_ANSWER)
        pool = open_pool(service, "late-open")
        pool.close_pool()
        for message in (*network.held, *network.passed):
            if message.rpc == "OpenPool":
                assert message.deliver()[0] is grpc.StatusCode.ABORTED
        assert service.get_pool("late-open").summary.state == pool_pb.POOL_STATE_CLOSED


def test_every_rpc_may_lose_its_answer_and_come_again(network):
    name = "everything-twice"
    with Client(network.target) as service:
        for rpc in ("OpenPool", "Apply", "Allocate", "Extend", "Free", "Reconcile", "ClosePool"):
            network.order(rpc, Fate.LOSE_ANSWER)
        pool = open_pool(service, name)
        answer = pool.apply([], [Allocate("a", prompt_tokens=PROMPT)])
        assert answer.replayed
        place = allocate(pool, "b")
        pool.extend(Extend(place.handle, place.length_tokens + 1))
        assert pool.free(Free(place.handle, End.FINISHED)).already_free
        pool.reconcile([answer.results[0].handle])
        seen = books(service, name)
        for message in network.passed[:-2]:  # the last two are of the last number
            assert message.deliver()[0] is not grpc.StatusCode.OK
        assert books(service, name) == seen
        pool.close_pool()


def test_a_slow_process_is_told_that_it_has_a_successor(network):
    name, open_id = "two-processes", "the-one"
    with Client(network.target) as slow, Client(network.target) as successor:
        first = open_pool(slow, name, open_id=open_id)
        kept = allocate(first, "kept")
        second = open_pool(successor, name, open_id=open_id)
        second.reconcile([kept.handle])
        for call in (lambda: first.free(Free(kept.handle, End.ABORTED)), first.close_pool):
            with pytest.raises(FencedError):
                call()
        network.order("OpenPool", Fate.HOLD)
        with pytest.raises(FencedError):
            open_pool(slow, name, open_id=open_id)
        network.held[0].deliver()
        allocate(second, "more")
        assert live(successor, name) == {"kept", "more"}


def test_a_batch_without_an_answer_is_resumed_before_its_places_are_kept(network):
    with (
        Client(network.target) as service,
        Client(network.target, retry_seconds=0) as hasty,
    ):
        pool = open_pool(hasty, "lost-answer")
        network.order("Apply", Fate.LOSE_ANSWER)
        with pytest.raises(UnavailableError):
            pool.apply([], [Allocate("a", prompt_tokens=PROMPT)])
        with pytest.raises(OdmaError, match="resume"):
            pool.reconcile([1])
        with pytest.raises(OdmaError, match="resume"):
            allocate(pool, "b")
        place = pool.resume().results[0]
        assert pool.reconcile([place.handle]).kept == [place]
        assert live(service, "lost-answer") == {"a"}


def test_a_stream_that_comes_late_does_nothing(network):
    with Client(network.target) as service:
        pool = open_pool(service, "late-stream")
        with pool.stream():
            pool.apply([], [Allocate("a", prompt_tokens=PROMPT)])
            network.order("Stream", Fate.HOLD, Fate.LOSE_ANSWER)
            pool.apply([], [Allocate("b", prompt_tokens=PROMPT)])
            pool.apply([], [Allocate("c", prompt_tokens=PROMPT)])
            seen = books(service, "late-stream")
            for message in (*network.held, *network.passed):
                message.deliver()
            assert books(service, "late-stream") == seen
            pool.apply([], [Allocate("d", prompt_tokens=PROMPT)])
        assert live(service, "late-stream") == {"a", "b", "c", "d"}
