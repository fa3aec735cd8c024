"""Who has opened a pool, so that an OpenPool that comes late changes nothing.

An instance is a process, an attempt one OpenPool that it sent. Of each instance the highest
attempt counts. One that another succeeded while its epoch ran is out: it opens the pool no more.
Whoever is older than the last MOST_REMEMBERED others is a stranger again. All but the owner say
how they saw the pool, and open it only if it still is so: what is late, of strangers too, is not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple, Self

from odma_service.errors import BooksMismatchError, FencedError, StaleOpenError

MOST_REMEMBERED = 64
OUT = 0
"""Stands for the attempts of an instance that is out."""


class Opening(NamedTuple):
    """One OpenPool: the instance that sent it, in hexadecimal digits, and its attempt."""

    instance: str = ""
    attempt: int = 0


NO_INSTANCE = Opening()


@dataclass(frozen=True, slots=True)
class Openers:
    """The owner's last OpenPool, and those of others, the latest at the end.

    An owner without an instance is one that cannot be told from others.
    """

    owner: Opening = NO_INSTANCE
    others: tuple[Opening, ...] = ()

    def check(self, opening: Opening, seen: str | None, *, name: str, owner: int, now: str) -> None:
        """Raise FencedError for an instance that is out, StaleOpenError for an old OpenPool.

        `seen` is how its sender saw the pool, `now` how it is; `name` and `owner` are its name and
        owner number.
        """
        if not opening.instance:
            return
        known = {one.instance: one.attempt for one in (*self.others, self.owner)}
        last = known.get(opening.instance, 0)
        if last == OUT and opening.instance in known:
            raise FencedError(name, owner)
        is_owner = opening.instance == self.owner.instance
        if opening.attempt <= last or (seen not in (None, now) and not is_owner):
            raise StaleOpenError(name, opening.attempt, last, now)

    def owned_by(self, opening: Opening, *, ends_another: bool) -> Openers:
        """Return these with another owner. ends_another: the epoch of the one before runs."""
        others, before = self._without(opening), self.owner
        if before.instance and before.instance != opening.instance:
            others += (before._replace(attempt=OUT) if ends_another else before,)
        return Openers(opening, others[-MOST_REMEMBERED:])

    def refused(self, opening: Opening) -> Openers:
        """Return these after an OpenPool that was refused: if it comes again it is an old one."""
        if opening.instance == self.owner.instance:
            return Openers(opening, self.others)
        return Openers(self.owner, (*self._without(opening), opening)[-MOST_REMEMBERED:])

    def _without(self, opening: Opening) -> tuple[Opening, ...]:
        return tuple(other for other in self.others if other.instance != opening.instance)

    def to_json(self) -> bytes:
        """Return these as the text that the books keep."""
        return json.dumps([self.owner, *self.others], separators=(",", ":")).encode()

    @classmethod
    def from_values(cls, values: object) -> Self:
        """Return what to_json wrote, once parsed. Raises BooksMismatchError for others."""
        try:
            owner, *others = (Opening(str(i), int(a)) for i, a in values)  # type: ignore[attr-defined]
        except (TypeError, ValueError) as error:
            raise BooksMismatchError(f"the books say nothing of who opened them: {error}") from None
        return cls(owner, tuple(others))


NOBODY = Openers()
