"""All errors a caller may see.

OdmaError
├── InvalidError         a value breaks a rule; `field` names it
├── PoolNotFoundError    no pool has this name
├── PoolOwnedError       another owner has the pool
├── PoolOpenError        the pool is open; close it first
├── EpochError           the epoch is over
├── FencedError          another instance owns the pool; stop
├── UnfencedError        a call without an owner number, in an epoch that has one
├── LateError            a message whose number was passed; nothing was changed
├── StaleOpenError       an OpenPool that is no newer than one before, or of another's pool
├── NotCompletedError    copies of the last answer are not promised; `last_seq` is its seq
├── SeqChangedError      the last seq, but with another body
├── SeqOldError          a seq older than the last
├── SeqGapError          a seq beyond the next one; `expected` is the next one
├── VersionError         another policy version is in force
├── NothingLearntError   too few completions to recalibrate
├── RefusedError         a unary call was refused; `refusal` gives the reason
├── HandleError          a handle that names no live region
├── PoolLimitError       no more pools, or their files would be too large
│   └── BooksSpaceError      no room on the disk for the books of one more
├── ModelError           a model directory that cannot be served; `file` is the bad file
├── UnfitModelError      an engine cannot serve a model of this kind
├── StreamLimitError     too many streams are open
├── StreamReplacedError  the pool has a newer stream
├── IdentityError        no token or certificate, or an unknown one
├── RoleError            the caller's role may not call this rpc
├── PoolForeignError     the name belongs to a pool of somebody else
├── BusyError            too many calls at once
├── CallerLimitError     too many calls, watches or unread answers of this caller
├── MessageSizeError     the message is too large
├── UnimplementedError   the service has no such rpc
├── ServiceError         a client's call failed, for another reason
│   └── UnavailableError     there was no answer; the call may have been done
└── BooksError           a pool's file cannot be used
    ├── BooksLockedError     another process has it open
    ├── BooksUnavailableError  the system refuses it now; the books are as they were
    ├── BooksForeignError    wrong owner, permissions or kind of file
    ├── BooksMismatchError   another layout or geometry
    └── BooksCorruptError    it breaks a rule that the library keeps
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from odma_service.values import Refusal


class OdmaError(Exception):
    """Base of all errors of this package.

    `reason` is what the wire calls a kind of errors; empty: it is never sent. `fields` are what
    makes the same error again: its attributes in order, and how to read them from text. Without
    fields it is made of its message.
    """

    reason: ClassVar[str] = ""
    fields: ClassVar[tuple[tuple[str, Callable[[str], Any]], ...]] = ()


class InvalidError(OdmaError, ValueError):
    """A value breaks a rule. `field` is its path, `rule` the rule."""

    reason = "INVALID"
    fields = (("field", str), ("rule", str))

    def __init__(self, field: str, rule: str) -> None:
        super().__init__(f"{field}: {rule}")
        self.field = field
        self.rule = rule


class PoolNotFoundError(OdmaError):
    """No pool has this name."""

    reason = "POOL_NOT_FOUND"
    fields = (("name", str),)

    def __init__(self, name: str) -> None:
        super().__init__(f"no pool is named {name!r}; open it first")
        self.name = name


class PoolOwnedError(OdmaError):
    """Another owner has the pool."""

    reason = "POOL_OWNED"
    fields = (("name", str), ("idle_seconds", float))

    def __init__(self, name: str, idle_seconds: float) -> None:
        super().__init__(
            f"pool {name!r} is owned, last heard of {idle_seconds:.1f} s ago; "
            "set take_over if its owner is dead"
        )
        self.name = name
        self.idle_seconds = idle_seconds


class PoolOpenError(OdmaError):
    """The pool is open, so it cannot be forgotten."""

    reason = "POOL_OPEN"
    fields = (("name", str),)

    def __init__(self, name: str) -> None:
        super().__init__(f"pool {name!r} is open; close it first")
        self.name = name


class EpochError(OdmaError):
    """The epoch is over: its places mean nothing any more."""

    reason = "EPOCH_OVER"
    fields = (("name", str), ("epoch", int))

    def __init__(self, name: str, epoch: int) -> None:
        super().__init__(f"epoch {epoch} of pool {name!r} is over; open the pool again")
        self.name = name
        self.epoch = epoch


class FencedError(OdmaError):
    """Another instance owns the pool. `owner` is the present owner number."""

    reason = "FENCED"
    fields = (("name", str), ("owner", int))

    def __init__(self, name: str, owner: int) -> None:
        super().__init__(f"pool {name!r} has another owner now, number {owner}; stop using it")
        self.name = name
        self.owner = owner


class UnfencedError(OdmaError):
    """The epoch has an owner number, and the call has none."""

    reason = "UNFENCED"
    fields = (("name", str), ("owner", int))

    def __init__(self, name: str, owner: int) -> None:
        super().__init__(
            f"pool {name!r} was opened with an instance; send the owner number that OpenPool "
            "answered, or as an operator by_operator or expected_version"
        )
        self.name = name
        self.owner = owner


class LateError(OdmaError):
    """The message is late: its number was passed, or refused before. Nothing was changed."""

    reason = "LATE"
    fields = (("number", int), ("last", int))

    def __init__(self, number: int, last: int) -> None:
        super().__init__(f"message {number} is late, the last was {last}; ask again under the next")
        self.number = number
        self.last = last


class StaleOpenError(OdmaError):
    """The pool has seen this attempt, or a later one, or is not as the sender saw it.

    Nothing was changed. `last` is the highest attempt, `seen` is how the pool is now.
    """

    reason = "OPEN_STALE"
    fields = (("name", str), ("attempt", int), ("last", int), ("seen", str))

    def __init__(self, name: str, attempt: int, last: int, seen: str) -> None:
        super().__init__(
            f"attempt {attempt} to open pool {name!r} is late: the last was {last}, and the pool "
            f"is as {seen!r}; ask with the next attempt and this as seen"
        )
        self.name = name
        self.attempt = attempt
        self.last = last
        self.seen = seen


class NotCompletedError(OdmaError):
    """The books say places to which the copies of the last answer are not promised to be done."""

    reason = "NOT_COMPLETED"
    fields = (("completed_seq", int), ("last_seq", int))

    def __init__(self, completed_seq: int, last_seq: int) -> None:
        super().__init__(
            f"completed_seq is {completed_seq}, the last answered seq is {last_seq}; do the "
            "copies of its answer first, or list no handles"
        )
        self.completed_seq = completed_seq
        self.last_seq = last_seq


class SeqChangedError(OdmaError):
    """The last seq again, but with another body."""

    reason = "SEQ_CHANGED"
    fields = (("seq", int),)

    def __init__(self, seq: int) -> None:
        super().__init__(f"seq {seq} was answered, for a batch with another body")
        self.seq = seq


class SeqOldError(OdmaError):
    """A seq older than the last one."""

    reason = "SEQ_OLD"
    fields = (("seq", int), ("expected", int))

    def __init__(self, seq: int, expected: int) -> None:
        last = expected - 1
        super().__init__(f"seq {seq} is older than the last, {last}; the next is {expected}")
        self.seq = seq
        self.expected = expected


class SeqGapError(OdmaError):
    """A seq beyond the next one."""

    reason = "SEQ_GAP"
    fields = (("seq", int), ("expected", int))

    def __init__(self, seq: int, expected: int) -> None:
        super().__init__(f"seq {seq} leaves a gap; the next is {expected}")
        self.seq = seq
        self.expected = expected


class VersionError(OdmaError):
    """Another policy version is in force."""

    reason = "VERSION"
    fields = (("expected", int), ("actual", int))

    def __init__(self, expected: int, actual: int) -> None:
        super().__init__(f"policy version {expected} was expected, {actual} is in force")
        self.expected = expected
        self.actual = actual


class NothingLearntError(OdmaError):
    """Nothing to recalibrate, or nothing to do it from."""

    reason = "NOTHING_LEARNT"


class RefusedError(OdmaError):
    """A unary call was refused."""

    reason = "REFUSED"

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(f"refused: {refusal.reason.name}")
        self.refusal = refusal


class HandleError(OdmaError):
    """The handle names no live region of this epoch."""

    reason = "HANDLE"
    fields = (("handle", int), ("rule", str))

    def __init__(self, handle: int, rule: str) -> None:
        super().__init__(f"handle {handle}: {rule}")
        self.handle = handle
        self.rule = rule


class PoolLimitError(OdmaError):
    """No more pools, or their files would be larger than they may be."""

    reason = "POOL_LIMIT"


class BooksSpaceError(PoolLimitError):
    """The disk of the pool directory has no room for the books of one more pool."""

    reason = "BOOKS_SPACE"


class ModelError(OdmaError):
    """A model directory cannot be served: `file` breaks a rule."""

    def __init__(self, file: Path, rule: str) -> None:
        super().__init__(f"model {file}: {rule}")
        self.file = file
        self.rule = rule


class UnfitModelError(OdmaError):
    """An engine cannot serve a model of this `kind`: `rule` says why."""

    def __init__(self, kind: str, rule: str) -> None:
        super().__init__(f"a model of kind {kind!r} cannot be served: {rule}")
        self.kind = kind
        self.rule = rule


class StreamLimitError(OdmaError):
    """Too many streams are open."""

    reason = "STREAM_LIMIT"


class StreamReplacedError(OdmaError):
    """The pool has a newer stream."""

    reason = "STREAM_REPLACED"
    fields = (("name", str),)

    def __init__(self, name: str) -> None:
        super().__init__(f"pool {name!r} has a newer stream, which ended this one")
        self.name = name


class IdentityError(OdmaError):
    """The caller gave no token or certificate, or an unknown one."""

    reason = "IDENTITY"


class RoleError(OdmaError):
    """The caller is known, but its role may not make this call."""

    reason = "ROLE"
    fields = (("rpc", str), ("role", str))

    def __init__(self, rpc: str, role: str) -> None:
        super().__init__(f"the role {role} may not call {rpc}")
        self.rpc = rpc
        self.role = role


class PoolForeignError(OdmaError):
    """The name belongs to a pool of somebody else."""

    reason = "POOL_FOREIGN"
    fields = (("name", str),)

    def __init__(self, name: str) -> None:
        super().__init__(f"the pool name {name!r} is taken by somebody else; choose another")
        self.name = name


class BusyError(OdmaError):
    """Too many calls at once: this one was not begun."""

    reason = "BUSY"


class CallerLimitError(OdmaError):
    """The caller has all that one caller may have: calls, watches or unread answers."""

    reason = "CALLER_LIMIT"


class MessageSizeError(OdmaError):
    """The message is larger than the service takes."""

    reason = "MESSAGE_SIZE"


class UnimplementedError(OdmaError):
    """The service has no such rpc, or it is switched off."""

    reason = "UNIMPLEMENTED"


class ServiceError(OdmaError):
    """A client's call failed for a reason that no other error names."""


class UnavailableError(ServiceError):
    """The service gave no answer in time, or failed inside: the call may have been done."""

    reason = "DRAINING"


class BooksError(OdmaError):
    """A pool's file cannot be used."""

    reason = "BOOKS"


class BooksLockedError(BooksError):
    """Another process has the file open."""

    reason = "BOOKS_LOCKED"


class BooksUnavailableError(BooksError):
    """The system refuses the file now: descriptors, memory, rights, a disk. Nothing is lost."""

    reason = "BOOKS_UNAVAILABLE"


class BooksForeignError(BooksError):
    """Wrong owner, permissions or kind of file."""


class BooksMismatchError(BooksError):
    """Another layout version or another geometry."""


class BooksCorruptError(BooksError):
    """The file breaks a rule that the library keeps."""
