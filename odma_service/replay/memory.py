"""Memory: what the loop asks of a policy, whichever way it keeps its books.

Once in a step, where there is anything to decide, the loop says which regions to give back,
which are full, and which requests wait for admission. All policies answer the same question,
so that one loop serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from odma_service.replay.load import Request
from odma_service.values import End


class Run:
    """A request while it runs. `lead` + the loop's tick is what is written."""

    __slots__ = ("birth", "due", "handle", "lead", "number", "request", "room")

    def __init__(self, number: int, request: Request, birth: int) -> None:
        self.number = number
        self.request = request
        self.birth = birth
        self.handle = 0
        self.room = 0  # tokens reserved for it
        self.lead = 0
        self.due = 0  # tick at which it ends, or is full


class Ended(NamedTuple):
    """A run to give back."""

    run: Run
    end: End
    output_tokens: int


class Asked(NamedTuple):
    """A request at the head of the queue; `generated_tokens` before a preemption."""

    number: int
    request: Request
    generated_tokens: int


class Step(NamedTuple):
    """What there is to decide in one step. `running` is in order of admission.

    `pass_refused`: those behind a refused one may be tried too.
    """

    number: int
    tick: int
    ended: list[Ended]
    full: list[Run]
    asked: list[Asked]
    running: dict[int, Run]
    pass_refused: bool = False


class Placed(NamedTuple):
    """An admitted request's region. `reused_tokens` of its prompt need no prefill."""

    handle: int
    room: int
    reused_tokens: int = 0


@dataclass(slots=True)
class Decision:
    """What was decided. Runs that were full have their new room already, or are stalled.

    placed    by those who asked, up to the last admitted: None was refused. One tenant's are
              admitted in their order
    victims   runs to preempt; their memory is given back as that of ended ones
    again     the next step may bring what was refused now, though nothing is freed in it
    unread    tokens that running ones have and a step need not read for each: it reads them once
    """

    placed: list[Placed | None] = field(default_factory=list)
    stalled: list[Run] = field(default_factory=list)
    victims: list[Run] = field(default_factory=list)
    again: bool = False
    copies: int = 0
    copied_tokens: int = 0
    unread_tokens: int = 0


class Memory(Protocol):
    """The memory of one device under one policy."""

    @property
    def kv_bandwidth_share(self) -> float:
        """What its layout lets KV reads reach of the sequential bandwidth."""

    def decide(self, step: Step) -> Decision:
        """Give back, grow and admit, in this order."""
