"""The values that engines and pools exchange, in tokens.

They are NamedTuples where a batch holds dozens of them: a frozen dataclass costs
three times as much to make, and a decode step waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from typing import NamedTuple, Self, cast


class End(IntEnum):
    """How a request ended: what its length teaches."""

    FINISHED = 1
    HIT_LIMIT = 2
    ABORTED = 3
    PREEMPTED = 4


class Reason(IntEnum):
    """Why an operation was refused. See RefusalReason in the proto for what to do."""

    NO_SPACE = 1
    FRAGMENTED = 2
    COPY_BUDGET = 3
    SAFETY_SHARE = 4
    QUOTA = 5
    TABLE_FULL = 6
    WAITS_FOR_COMPLETION = 7
    PINNED = 8
    NOT_FOUND = 9
    INVALID = 10
    SKIPPED = 11
    CLAIMED = 12

    @classmethod
    def _missing_(cls, number: object) -> Reason:
        """Return a reason of a newer service: a refusal all the same."""
        reason = int.__new__(cls, cast("int", number))
        reason._name_, reason._value_ = f"UNKNOWN_{number}", reason.real
        return reason


class Moves(IntEnum):
    """What an engine lets the pool move."""

    NONE = 1
    OWN_GROWTH = 2
    ANY = 3


class Start(IntEnum):
    """Where the length of a new region starts from."""

    MAXIMUM = 1
    QUANTILE = 2
    STEP = 3


class Overflow(IntEnum):
    """What may be done for a region that cannot grow in place."""

    PREEMPT = 1
    RELOCATE = 2
    COMPACT = 3


@dataclass(frozen=True, slots=True)
class PlaneGroup:
    """`count` planes of one shape. A pool's Geometry checks it, and so can name it."""

    count: int
    bytes_per_token: int
    alignment_bytes: int = 1


class TenantShare(NamedTuple):
    """What one tenant is sure of and what it may hold, as shares of the capacity."""

    name: str
    guaranteed_share: float = 0.0
    maximum_share: float = 1.0


class PolicyChange(NamedTuple):
    """A policy to install: a named record with some fields changed. None, () and "" keep."""

    name: str = ""
    step_tokens: int | None = None
    limits_tokens: Sequence[int] = ()
    clear_limits: bool = False
    overflow_risk: float | None = None
    safety_share: float | None = None
    unsure_ratio: float | None = None
    growth: float | None = None
    tenant_share: float | None = None
    max_copy_tokens: int | None = None
    tenants: Sequence[TenantShare] = ()
    clear_tenants: bool = False


KEY_BYTES = 16
"""Of the key of one granule."""


class Text:
    """A prompt in UTF-8, encoded and hashed once; `seen` is for the model that embeds it.

    A model takes any bytes, an Allocate the 16 KiB of UTF-8 that the service takes.
    """

    __slots__ = ("data", "digest", "seen")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.digest = blake2b(data, digest_size=16).digest()
        self.seen: object = None

    @classmethod
    def of(cls, text: str) -> Self:
        """Return what a str says. Raises UnicodeEncodeError for half a surrogate pair."""
        return cls(text.encode())

    def __len__(self) -> int:
        """Return the number of bytes."""
        return len(self.data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Text) and self.data == other.data

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        """Say nothing of the prompt: it may be logged."""
        return f"Text of {len(self)} bytes"


class Used(NamedTuple):
    """How much of a region is written: an upper bound with all enqueued work.

    shareable_tokens are final, and may be reused as far as keys stand for them.
    """

    handle: int
    used_tokens: int
    pinned: bool = False
    shareable_tokens: int = 0


class Free(NamedTuple):
    """Give a region back.

    keep_tokens are final, and kept for later requests as far as keys stand for them: `keys`
    continue those of the Allocate.
    """

    handle: int
    end: End
    output_tokens: int = 0
    keep_tokens: int = 0
    keys: bytes = b""


class Trim(NamedTuple):
    """Give back the end of a region."""

    handle: int
    to_tokens: int


class Extend(NamedTuple):
    """Ask for more room; lengths are totals. want_tokens 0: the policy decides."""

    handle: int
    least_tokens: int
    want_tokens: int = 0


class Allocate(NamedTuple):
    """Ask for a region for one request. None means unset.

    A text that is a Text already is neither encoded nor hashed again. `keys` has KEY_BYTES for
    each granule from the first: what the request begins with, for the reuse of its KV.
    """

    request_id: str
    prompt_tokens: int
    generated_tokens: int = 0
    max_total_tokens: int | None = None
    request_class: str = ""
    tenant: str = ""
    overflow_risk: float | None = None
    predicted_output_tokens: int | None = None
    text: Text | str | None = None
    keys: bytes = b""


Op = Free | Trim | Extend | Allocate


class Batch(NamedTuple):
    """What an engine asks in one decode step. max_copy_tokens None: the policy's."""

    seq: int
    completed_seq: int
    used: list[Used]
    ops: list[Op]
    max_copy_tokens: int | None = None
    pass_refused: bool = False


class Caller(NamedTuple):
    """Who asks: the owner number of an epoch, and the number of this message of the owner.

    Zeros where the epoch has no owner number, as with an embedded pool.
    """

    epoch: int
    owner: int = 0
    number: int = 0

    @classmethod
    def of(cls, caller: Caller | int) -> Caller:
        """Return `caller`. An epoch alone: the owner of one without an owner number."""
        return caller if type(caller) is cls else cls(cast("int", caller))


class Place(NamedTuple):
    """Where a region lies. length_tokens 0: a later operation freed it.

    The first reused_tokens need no prefill; of these the first shared_tokens lie elsewhere, from
    shared_start_token, and the region's own memory begins behind them.
    """

    handle: int
    start_token: int
    length_tokens: int
    reused_tokens: int = 0
    shared_start_token: int = 0
    shared_tokens: int = 0


class Copy(NamedTuple):
    """In every plane, copy `tokens` tokens from one place to another. handle 0: of a kept run."""

    handle: int
    from_token: int
    to_token: int
    tokens: int
    overlaps: bool


class Refusal(NamedTuple):
    """An operation that was not done. preempt_handle 0: nobody."""

    reason: Reason
    free_tokens: int = 0
    largest_run_tokens: int = 0
    awaiting_completion_tokens: int = 0
    copy_tokens_needed: int = 0
    preempt_handle: int = 0
    field: str = ""


class Freed(NamedTuple):
    """A region was given back, now or before."""

    already_free: bool = False


Result = Place | Refusal | Freed


class Answer(NamedTuple):
    """The outcome of a batch: one result an operation, copies in order."""

    seq: int
    replayed: bool
    results: list[Result]
    copies: list[Copy]
    moved: list[Place]
    policy_version: int


class Reconciled(NamedTuple):
    """Where the listed regions lie, which of them are dead, and which others were freed."""

    kept: list[Place]
    unknown: list[int]
    freed: list[int]
    last_seq: int


QUANTILE_LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
"""Levels of a prediction: quantiles of output tokens."""

Quantiles = tuple[float, float, float, float, float, float, float]


class Prediction(NamedTuple):
    """A prediction that was corrected; `raw` is what it was before, which the books keep too.

    quantiles None: not to be acted on.
    """

    quantiles: Quantiles | None
    raw: Quantiles


Predicted = Quantiles | Prediction
