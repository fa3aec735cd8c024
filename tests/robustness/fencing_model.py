"""A model of who owns a pool and of a network that delays, repeats and reorders.

Two processes, one service, and messages that are never lost for good: what was sent may be
delivered at any time, any number of times, in any order, and each answer may be lost. The old
way (no numbers) and the new way (instance, try, owner, number) are two services and two clients
in one frame. `search` visits every state within the budgets and returns the shortest way to each
harm. Each commit is there or not after a crash of the service, so that a crash is a lost answer,
except where a rule says otherwise. A batch on a stream that its client has left is a late message.

Not in the model: learning, tenants, several streams of a device, vacated runs, operators' calls
that carry expected_version. A process that was succeeded does nothing to the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

PLACES = 2
MOST_HANDLES = 4  # what would make more is not gone on from
MOST_EPOCHS = 3
MOST_OWNERS = 5
OUT = -1  # an instance that was succeeded

# What the new way adds. Leaving one out must be found.
RULES = frozenset(
    {
        "smaller owner",  # is refused
        "smaller number",  # is refused
        "same number",  # is done again
        "refused number",  # is used up
        "same commit",  # holds the number and its effect
        "new try",  # must be above the highest
        "seen",  # only the owner's instance opens a pool that is not as its sender saw it
        "succeeded instance",  # stays out, if its epoch ran when another came
        "refused try",  # of OpenPool is used up
        "outlives the epoch",  # what is known of instances
        "no fingerprint",  # holds the owner and the number
        "unfenced",  # calls are refused after an instance was answered
        "promise",  # of Reconcile is a number
        "replayed",  # answers do not make a stream that of its pool
    }
)

SHARED = "two living requests share a place"
TAKEN = "a region was freed or moved without asking"
LEAKED = "a region lives that nobody owns"
UNCOPIED = "a place without its data is taken as valid"
REVIVED = "a closed pool lives again"
REFUSED = "wanted work is refused for ever"
CHANGED = "a policy is in force that was given up"
KEPT_ALIVE = "who has a successor keeps its pool alive"
HARMS = (SHARED, TAKEN, LEAKED, UNCOPIED, REVIVED, REFUSED, CHANGED, KEPT_ALIVE)

LEARNT = -1  # the policy that Recalibrate sets
UNKNOWN = -2  # the policy, to who has no answer
UNSEEN = (0, 0)  # what is said of a pool that was not seen
BATCHES = ("Apply", "Stream")
SUCCEEDED = ("opened", "ready", "closed")  # a second process that was let in
ASKED_AGAIN = ("KeepAlive", "SetPolicy", "Recalibrate")  # or given up, with nothing to find out


class Message(NamedTuple):
    """What a process sends. In the old way instance, attempt, owner and number are 0."""

    rpc: str
    sender: int
    epoch: int = 0
    owner: int = 0
    number: int = 0
    body: Any = None
    seq: int = 0
    attempt: int = 0
    seen: tuple[int, int] = UNSEEN
    stream: int = 0


class Event(NamedTuple):
    """What happens between two states: a message is sent, or delivered, or something else."""

    what: str  # sent, done (its answer is lost), answered, torn, room, others
    message: Message = Message("", 0)
    answer: Any = None
    late: bool = False  # nobody waits for it

    def __str__(self) -> str:
        message = self.message
        numbers = {
            "try": message.attempt,
            "owner": message.owner,
            "number": message.number,
            "stream": message.stream,
        }
        told = [f"{key} {value}" for key, value in numbers.items() if value]
        body = [] if message.body is None else [str(message.body)]
        words = [f"{'AB'[message.sender]}'s", message.rpc, *body, *told, "is", self.what]
        if self.what == "room":
            return "the operator makes room"
        if self.what == "others":
            return "other instances open the pool and close it"
        return (
            " ".join(words)
            + (" late" if self.late else "")
            + (f": {self.answer}" if self.answer else "")
        )


class Service(NamedTuple):
    """The books of one pool. Regions are (handle, place, request)."""

    is_open: bool = False
    epoch: int = 0
    open_id: int = 0
    regions: frozenset[tuple[int, int, int]] = frozenset()
    handles: int = 0
    seq: int = 0
    stored: Any = None
    roomy: bool = True
    owner: int = 0
    instance: int = -1
    attempts: tuple[int, int] = (0, 0)  # the highest of each instance, or OUT
    number: int = 0
    number_refused: bool = False
    fenced: bool = False
    policy: int = 0
    stream: int = 0  # that of the pool
    replaced: frozenset[int] = frozenset()  # streams


class Process(NamedTuple):
    """An engine and its client. `view` is what it holds: (handle, place), one for each place."""

    stage: str = "down"  # opening, opened, ready, closed, stopped
    waits: Message | None = None
    batch: Any = None  # of an Apply that has no answer
    view: frozenset[tuple[int, int]] = frozenset()
    epoch: int = 0
    owner: int = 0
    number: int = 0
    seq: int = 0
    attempt: int = 0
    closing: bool = False  # gave up a ClosePool
    seen: tuple[int, int] = UNSEEN
    policy: int = 0
    stream: int = 0
    requests: int = 0
    left: int = 0


class State(NamedTuple):
    """Everything at one moment."""

    service: Service
    first: Process
    second: Process
    sent: frozenset[Message]


class Frame(NamedTuple):
    """What is searched: which way, who takes part, what may go wrong."""

    new: bool
    rules: frozenset[str] = RULES
    steps: tuple[int, int] = (4, 0)  # budgets of the two processes
    second: str = "none"  # "same" open_id, "other" one with take_over, "polite" without
    first_is_old: bool = False  # a client of the old way at the new service
    late: frozenset[str] | None = None  # rpcs that come late; None: all
    choices: frozenset[str] | None = None  # what engines do; None: all
    limited: bool = False  # room for one region until an operator changes the policy
    answered_first: bool = True  # the second starts when the first has opened
    first_dies: bool = False  # when the second starts; what it sent is left
    opens_after_closing: bool = False  # the first of two, without an answer to its ClosePool
    others: bool = False  # come and go when the pool is closed, as many as the service remembers
    harms: tuple[str, ...] = HARMS


class Found(NamedTuple):
    """How many states there are, and the shortest way to each harm."""

    states: int
    ways: dict[str, list[Event]]


def search(frame: Frame, *, first: bool = False, most_states: int = 2_000_000) -> Found:
    """Visit all states, or those until the first harm. A state with a harm is not gone on from."""
    begin = State(
        Service(roomy=not frame.limited),
        Process(left=frame.steps[0]),
        Process(left=frame.steps[1]),
        frozenset(),
    )
    came: dict[State, tuple[State, Event] | None] = {begin: None}
    ways: dict[str, list[Event]] = {}
    queue = deque([begin])
    while queue:
        state = queue.popleft()
        for event, after, harm in _next(frame, state):
            harm = harm or _harm(frame, after)  # noqa: PLW2901
            if harm:
                if harm in frame.harms and harm not in ways:
                    ways[harm] = [*_way(came, state), event]
                if first and ways:
                    return Found(len(came), ways)
                if harm in frame.harms:
                    continue
            if after not in came and _within(after.service):
                came[after] = state, event
                queue.append(after)
                if len(came) > most_states:
                    raise RuntimeError(f"more than {most_states} states")
    return Found(len(came), ways)


def _within(service: Service) -> bool:
    return (
        service.handles <= MOST_HANDLES
        and service.epoch <= MOST_EPOCHS
        and service.owner <= MOST_OWNERS
    )


def _way(came: dict[State, tuple[State, Event] | None], state: State) -> list[Event]:
    events: list[Event] = []
    while (step := came[state]) is not None:
        state, event = step
        events.append(event)
    return events[::-1]


def _counts(frame: Frame, state: State) -> bool:
    """Whether the present owner is one whom the service protects."""
    return not frame.first_is_old or state.second.stage != "down"


def _harm(frame: Frame, state: State) -> str | None:
    """Hold what the present owner knows against the books, when it waits for nothing."""
    if not _counts(frame, state):
        return None
    service = state.service
    if state.second.stage == "turned away":  # and does not want the pool any more
        return REVIVED if service.is_open and service.open_id == 2 else None
    owner = state.second if state.second.stage != "down" else state.first
    if owner.stage == "closed":
        return REVIVED if service.is_open else None
    if owner.stage != "ready" or owner.waits is not None:
        return None
    books = {(handle, place) for handle, place, _ in service.regions}
    if not service.is_open or service.epoch != owner.epoch or owner.view - books:
        return TAKEN
    if owner.policy not in (service.policy, UNKNOWN):
        return CHANGED
    return LEAKED if books - owner.view else None


Step = tuple[Event, State, str | None]


def _next(frame: Frame, state: State) -> Iterator[Step]:
    yield from _acts(frame, state)
    for message in state.sent:
        yield from _deliveries(frame, state, message)
    if not state.service.roomy:
        service = state.service._replace(roomy=True)
        yield Event("room"), state._replace(service=service), None
    if frame.others and state.service.epoch and not state.service.is_open:
        service = _new_epoch(state.service, 0)._replace(is_open=False, instance=-1, attempts=(0, 0))
        yield Event("others"), state._replace(service=service), None


# What processes do.


def _first_is_dead(frame: Frame, state: State) -> bool:
    return frame.first_dies and state.second.stage != "down"


def _is_new(frame: Frame, who: int) -> bool:
    return frame.new and not (who == 0 and frame.first_is_old)


def _acts(frame: Frame, state: State) -> Iterator[Step]:
    for who in (0, 1):
        if who == 0 and _first_is_dead(frame, state):
            continue
        process = state[1 + who]
        for after in _choices(frame, state, who, process):
            assert after.waits is not None
            sent = state.sent | {after.waits}
            changed = state._replace(**{("first", "second")[who]: after}, sent=sent)
            yield Event("sent", after.waits), changed, None


def _choices(frame: Frame, state: State, who: int, process: Process) -> Iterator[Process]:
    if process.stage == "down":
        yield from _start(frame, state, who, process)
        return
    new = _is_new(frame, who)
    if process.waits is not None:
        yield from _impatience(frame, who, process, new)
        return
    if process.stage == "opened":
        yield from _begin(frame, who, process, new)
    elif process.stage == "ready" and process.left:
        for after in _wishes(frame, who, process, new):
            yield after._replace(left=process.left - 1)


def _allowed(frame: Frame, what: str) -> bool:
    return frame.choices is None or what in frame.choices


def _asked_for(frame: Frame, what: str) -> bool:
    """Return whether engines do what is only done in frames that name it."""
    return frame.choices is not None and what in frame.choices


def _start(frame: Frame, state: State, who: int, process: Process) -> Iterator[Process]:
    if who == 1:
        if frame.second == "none" or state.first.stage == "down":
            return
        if frame.answered_first and not state.first.epoch:
            return
        if frame.second == "same":  # it finds the table that the first had kept
            process = process._replace(
                epoch=state.first.epoch, view=state.first.view, seq=state.first.seq
            )
    yield _opening(frame, who, process)


def _opening(frame: Frame, who: int, process: Process) -> Process:
    attempt = process.attempt + 1 if _is_new(frame, who) else 0
    others = who == 1 and frame.second != "same"
    body = (1 + others, frame.second == "other")
    message = Message("OpenPool", who, body=body, attempt=attempt, seen=process.seen)
    return process._replace(stage="opening", waits=message, attempt=attempt)


def _impatience(frame: Frame, who: int, process: Process, new: bool) -> Iterator[Process]:
    """Give up a call without an answer. Sending it again is a second delivery."""
    assert process.waits is not None
    rpc = process.waits.rpc
    if rpc == "OpenPool":
        if new and process.left:
            yield _opening(frame, who, process._replace(left=process.left - 1))
        return
    if not process.left or not _allowed(frame, "give up"):
        return
    rest = process._replace(waits=None, left=process.left - 1)
    if rpc in ASKED_AGAIN:
        policy = process.policy if rpc == "KeepAlive" else UNKNOWN
        yield from _wishes(frame, who, rest._replace(policy=policy), new)
    if rpc == "Stream":  # the same batch over another one
        stream = process.stream + 1
        yield rest._replace(waits=process.waits._replace(stream=stream), stream=stream)
    if rpc in ("Allocate", "Extend", "Free"):
        yield _reconcile(who, rest, new, process.view)
    if rpc in BATCHES:
        dropped = rest._replace(batch=None)
        if new:  # the client raises if handles are listed
            yield _reconcile(who, dropped, new, frozenset())
        else:
            yield _reconcile(who, dropped, new, process.view)
    may_open = rpc in BATCHES or frame.second == "none" or frame.opens_after_closing
    if rpc in ("ClosePool", *BATCHES) and may_open:
        yield _opening(frame, who, rest._replace(closing=rpc == "ClosePool", seen=UNSEEN))


def _begin(frame: Frame, who: int, process: Process, new: bool) -> Iterator[Process]:
    if process.batch is not None:
        yield _apply(frame, who, process, new, process.batch)
    else:
        yield _reconcile(who, process, new, process.view)
        if process.view:
            yield _reconcile(who, process, new, frozenset())


def _wishes(frame: Frame, who: int, process: Process, new: bool) -> Iterator[Process]:
    request = 10 * who + process.requests + 1
    more = process._replace(requests=process.requests + 1)
    if _allowed(frame, "Allocate"):
        yield _numbered(who, more, new, "Allocate", request)
    if _allowed(frame, "Apply"):
        yield _apply(frame, who, more, new, ("place", request))
    for handle in {handle for handle, _ in process.view}:
        if _allowed(frame, "Apply"):
            yield _apply(frame, who, process, new, ("move", handle))
        if _allowed(frame, "Free"):
            yield _numbered(who, process, new, "Free", handle)
        if _asked_for(frame, "Extend"):
            yield _numbered(who, process, new, "Extend", handle)
    if _allowed(frame, "Reconcile"):
        yield _reconcile(who, process, new, process.view)
        if process.view:
            yield _reconcile(who, process, new, frozenset())
    if _allowed(frame, "ClosePool"):
        yield _numbered(who, process, new, "ClosePool", None)
    if _allowed(frame, "reopen"):
        yield _opening(frame, who, process._replace(seen=UNSEEN))
    if _asked_for(frame, "SetPolicy"):
        yield _numbered(who, more, new, "SetPolicy", request)
    if _asked_for(frame, "Recalibrate"):
        yield _numbered(who, process, new, "Recalibrate", LEARNT)
    if _asked_for(frame, "KeepAlive"):
        message = Message("KeepAlive", who, process.epoch, process.owner)
        yield process._replace(waits=message)


def _numbered(who: int, process: Process, new: bool, rpc: str, body: Any, seq: int = 0) -> Process:
    number = process.number + 1 if new else 0
    message = Message(rpc, who, process.epoch, process.owner, number, body, seq)
    return process._replace(waits=message, number=number)


def _apply(frame: Frame, who: int, process: Process, new: bool, batch: Any) -> Process:
    after = _numbered(who, process, new, "Apply", batch, process.seq + 1)
    assert after.waits is not None
    if _asked_for(frame, "Stream"):
        stream = process.stream or 10 * who + 1
        over = after.waits._replace(rpc="Stream", stream=stream)
        after = after._replace(waits=over, stream=stream)
    return after._replace(batch=batch)


def _reconcile(who: int, process: Process, new: bool, keep: frozenset[tuple[int, int]]) -> Process:
    handles = tuple(sorted({handle for handle, _ in keep}))
    # What is promised is what was answered.
    after = _numbered(who, process, new, "Reconcile", handles, process.seq)
    return after._replace(view=keep, stage="opened")


# What the network does.


def _deliveries(frame: Frame, state: State, message: Message) -> Iterator[Step]:
    process = state[1 + message.sender]
    dead = message.sender == 0 and _first_is_dead(frame, state)
    waited = process.waits == message and not dead
    if frame.late is not None and message.rpc not in frame.late and not waited:
        return
    late = not waited
    serve = _serve_new if frame.new else _serve_old
    service, answer = serve(frame, state.service, message)
    if message.sender == 0 and answer == ("alive",) and state.second.stage in SUCCEEDED:
        yield Event("done", message, late=late), state, KEPT_ALIVE
    if service != state.service:
        yield Event("done", message, late=late), state._replace(service=service), None
        if frame.new and "same commit" not in frame.rules and message.rpc != "OpenPool":
            torn = service._replace(
                number=state.service.number, number_refused=state.service.number_refused
            )
            yield Event("torn", message, late=late), state._replace(service=torn), None
    if waited:
        present = message.sender == 1 or state.second.stage == "down"
        after, harm = _hear(frame, process, message, answer)
        if not present or not _counts(frame, state):
            harm = None
        changed = state._replace(service=service, **{("first", "second")[message.sender]: after})
        if after.waits is not None:  # what it asks instead
            changed = changed._replace(sent=state.sent | {after.waits})
        yield Event("answered", message, answer), changed, harm


def _hear(
    frame: Frame, process: Process, message: Message, answer: tuple[Any, ...]
) -> tuple[Process, str | None]:
    kind, *facts = answer
    idle = process._replace(waits=None)
    view = process.view
    if message.rpc in BATCHES and kind != "refused":
        idle = idle._replace(seq=message.seq, batch=None)
    if kind == "used up":  # by a refusal whose answer was lost: ask under a new number
        if not process.left:
            return idle, None
        idle = idle._replace(left=process.left - 1)
        return _numbered(message.sender, idle, True, message.rpc, message.body), None
    if kind == "promise":  # the copies of some answer are not done: keep nothing
        return idle._replace(view=frozenset(), seq=facts[0]), None
    if kind == "unseen":
        return _opening(frame, message.sender, process._replace(seen=facts[0])), None
    if answer == ("refused", "OPEN_STALE"):  # a repeated delivery was first: ask with the next try
        return process, None
    if answer == ("refused", "POOL_OWNED"):
        return idle._replace(stage="turned away"), None
    if kind == "refused":
        return idle._replace(stage="stopped"), REFUSED
    if kind == "opened":
        epoch, owner, policy = facts
        idle = idle._replace(
            stage="opened", epoch=epoch, owner=owner, number=0, closing=False, policy=policy
        )
        if epoch == process.epoch:
            return idle, None
        # A successor's predecessor may have closed the pool, or the process itself, late.
        excused = message.sender or process.closing or not view
        empty = idle._replace(stage="ready", view=frozenset(), seq=0, batch=None)
        return empty, None if excused else TAKEN
    if kind == "closed":
        return idle._replace(stage="closed", view=frozenset()), None
    if kind == "kept":
        places, seq = facts
        moved = _starts(places) - _starts(view)
        after = idle._replace(stage="ready", view=places, seq=seq)
        return after, (UNCOPIED if moved else None)
    if kind == "grown":
        return idle._replace(view=view | {facts[0]}), None
    if kind == "set":
        return idle._replace(policy=facts[0]), None
    if kind == "freed":
        return idle._replace(view=frozenset(one for one in view if one[0] != facts[0])), None
    if kind == "placed":
        handle, place = facts
        others = frozenset(one for one in view if one[0] != handle)
        harm = SHARED if any(place == other for _, other in others) else None
        return idle._replace(view=others | {(handle, place)}), harm
    return idle, None  # full, nothing to move, or alive


def _starts(view: frozenset[tuple[int, int]]) -> set[tuple[int, int]]:
    """Return where regions begin: what is behind has no data yet."""
    return {(handle, min(place for h, place in view if h == handle)) for handle, _ in view}


# What the service does.


def _serve_old(frame: Frame, service: Service, message: Message) -> tuple[Service, tuple[Any, ...]]:
    if message.rpc == "OpenPool":
        open_id, take_over = message.body
        if service.is_open and service.open_id != open_id and not take_over:
            return service, ("refused", "POOL_OWNED")
        if not service.is_open or service.open_id != open_id:
            service = _new_epoch(service, open_id)
        return service, ("opened", service.epoch, 0, service.policy)
    if message.rpc == "ClosePool" and (not service.is_open or message.epoch < service.epoch):
        return service, ("closed",)
    if not service.is_open or message.epoch != service.epoch:
        return service, ("refused", "EPOCH_OVER")
    return _do(frame, service, message, (message.body, message.seq))


def _serve_new(frame: Frame, service: Service, message: Message) -> tuple[Service, tuple[Any, ...]]:
    rules = frame.rules
    if message.rpc == "OpenPool" and message.attempt:
        return _become_owner(frame, service, message)
    if not message.owner and not (service.is_open and service.fenced):
        return _serve_old(frame, service, message)
    if message.rpc == "OpenPool":
        return service, ("refused", "UNFENCED")
    if message.rpc == "ClosePool" and (not service.is_open or message.epoch < service.epoch):
        return service, ("closed",)
    if not service.is_open or message.epoch != service.epoch:
        return service, ("refused", "EPOCH_OVER")
    if not message.owner:
        if "unfenced" in rules:
            return service, ("refused", "UNFENCED")
        return _serve_old(frame, service, message)
    if message.owner < service.owner and "smaller owner" in rules:
        return service, ("refused", "FENCED")
    if message.rpc == "KeepAlive":
        return service, ("alive",)
    if message.number < service.number and "smaller number" in rules:
        return service, ("refused", "LATE")
    if message.number == service.number:
        if "same number" not in rules:
            return service, ("refused", "LATE")
        if service.number_refused and "refused number" in rules:
            return service, ("used up",)
    unkept = message.rpc == "Reconcile" and message.body and message.seq < service.seq
    if unkept and "promise" in rules:
        return service, ("promise", service.seq)
    fingerprint = (message.body, message.seq)
    if "no fingerprint" not in rules:
        fingerprint += (message.owner, message.number)
    done, answer = _do(frame, service, message, fingerprint)
    if answer[0] == "refused":
        return service, answer
    if message.rpc == "ClosePool" and "outlives the epoch" not in rules:
        done = done._replace(instance=-1, attempts=(0, 0))
    refused = answer[0] == "full" and message.rpc not in BATCHES
    return done._replace(number=message.number, number_refused=refused), answer


def _become_owner(
    frame: Frame, service: Service, message: Message
) -> tuple[Service, tuple[Any, ...]]:
    open_id, take_over = message.body
    instance = message.sender
    highest = service.attempts[instance]
    if highest == OUT:
        return service, ("refused", "FENCED")
    if message.attempt <= highest and "new try" in frame.rules:
        return service, ("refused", "OPEN_STALE")
    now = (service.epoch, service.owner * service.is_open)
    if instance != service.instance and message.seen != now and "seen" in frame.rules:
        return service, ("unseen", now)
    attempts = list(service.attempts)
    attempts[instance] = message.attempt
    if service.is_open and service.open_id != open_id and not take_over:
        if "refused try" in frame.rules:
            service = service._replace(attempts=tuple(attempts))
        return service, ("refused", "POOL_OWNED")
    before = service.instance
    succeeds = service.is_open and before not in (-1, instance)
    if succeeds and "succeeded instance" in frame.rules:
        attempts[before] = OUT
    if not service.is_open or service.open_id != open_id:
        service = _new_epoch(service, open_id)
    service = service._replace(
        owner=service.owner + 1,
        instance=instance,
        attempts=tuple(attempts),
        number=0,
        number_refused=False,
        fenced=True,
    )
    return service, ("opened", service.epoch, service.owner, service.policy)


def _new_epoch(service: Service, open_id: int) -> Service:
    return service._replace(
        is_open=True,
        epoch=service.epoch + 1,
        open_id=open_id,
        regions=frozenset(),
        seq=0,
        stored=None,
        fenced=False,
    )


def _do(
    frame: Frame, service: Service, message: Message, body: Any
) -> tuple[Service, tuple[Any, ...]]:
    if message.rpc == "ClosePool":
        return service._replace(is_open=False, regions=frozenset()), ("closed",)
    if message.rpc == "Apply":
        return _do_batch(service, message, body)
    if message.rpc == "Stream":
        return _do_streamed(frame, service, message, body)
    if message.rpc == "Extend":
        return _grow(service, message.body)
    if message.rpc in ("SetPolicy", "Recalibrate"):
        return service._replace(policy=message.body), ("set", message.body)
    if message.rpc == "KeepAlive":
        return service, ("alive",)
    if message.rpc == "Reconcile":
        kept = frozenset(one for one in service.regions if one[0] in message.body)
        places = frozenset((handle, place) for handle, place, _ in kept)
        return service._replace(regions=kept), ("kept", places, service.seq)
    if message.rpc == "Allocate":
        return _place(service, message.body)
    assert message.rpc == "Free"
    return _without(service, message.body), ("freed", message.body)


def _do_batch(service: Service, message: Message, body: Any) -> tuple[Service, tuple[Any, ...]]:
    if message.seq == service.seq and service.stored:
        stored, answer = service.stored
        return service, answer if stored == body else ("refused", "OTHER_BODY")
    if message.seq != service.seq + 1:
        return service, ("refused", "SEQ")
    what, which = message.body
    if what == "place":
        done, answer = _place(service, which)
    else:
        done, answer = _move(service, which)
    return done._replace(seq=message.seq, stored=(body, answer)), answer


def _do_streamed(
    frame: Frame, service: Service, message: Message, body: Any
) -> tuple[Service, tuple[Any, ...]]:
    if message.stream in service.replaced:
        return service, ("refused", "STREAM_REPLACED")
    done, answer = _do_batch(service, message, body)
    replayed = done.seq == service.seq and "replayed" in frame.rules
    if answer[0] == "refused" or replayed or service.stream == message.stream:
        return done, answer
    replaced = service.replaced | {service.stream}
    return done._replace(stream=message.stream, replaced=replaced - {0}), answer


def _free_places(service: Service) -> list[int]:
    taken = {place for _, place, _ in service.regions}
    return [place for place in range(PLACES if service.roomy else 1) if place not in taken]


def _place(service: Service, request: int) -> tuple[Service, tuple[Any, ...]]:
    for handle, place, other in sorted(service.regions):
        if other == request:
            return service, ("placed", handle, place)
    places = _free_places(service)
    if not places:
        return service, ("full",)
    handle = service.handles + 1
    regions = service.regions | {(handle, places[0], request)}
    return service._replace(regions=regions, handles=handle), ("placed", handle, places[0])


def _grow(service: Service, handle: int) -> tuple[Service, tuple[Any, ...]]:
    """Give a region the place behind it, if it has not got it."""
    held = sorted(one for one in service.regions if one[0] == handle)
    if not held:
        return service, ("nothing",)
    _, place, request = held[0]
    if len(held) == 1 and place + 1 not in _free_places(service):
        return service, ("full",)
    regions = service.regions | {(handle, place + 1, request)}
    return service._replace(regions=regions), ("grown", (handle, place + 1))


def _move(service: Service, handle: int) -> tuple[Service, tuple[Any, ...]]:
    places = _free_places(service)
    for one in service.regions:
        if one[0] == handle and places:
            moved = service.regions - {one} | {(handle, places[0], one[2])}
            return service._replace(regions=moved), ("placed", handle, places[0])
    return service, ("nothing",)


def _without(service: Service, handle: int) -> Service:
    return service._replace(regions=frozenset(one for one in service.regions if one[0] != handle))
