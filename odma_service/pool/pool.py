"""Pool: one device allocation, its owner's epochs and its books.

The domain's door, for the service and for an engine that embeds a pool without one. A pool
belongs to the process that made it and to one thread at a time; until it is closed any thread may
read it meanwhile. It knows neither clocks nor names of files: paths, epochs, boot ids and
predictions come in as arguments.
"""

from __future__ import annotations

import json
import re
from dataclasses import astuple, dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Self

from odma_service._native import (
    CLASS_OTHER,
    CLASS_POOL,
    MOST_BLOCKS,
    MOST_CAPACITY_TOKENS,
    Arena,
    ArenaGeometry,
    ArenaReport,
    Completion,
    EngineRecord,
    Histogram,
    RegionEntry,
    TenantUse,
)
from odma_service.errors import (
    BooksMismatchError,
    EpochError,
    FencedError,
    HandleError,
    InvalidError,
    RefusedError,
    UnfencedError,
    VersionError,
)
from odma_service.pool.geometry import (
    MOST_MODEL_LENGTH_TOKENS,
    PRESETS,
    Device,
    Geometry,
)
from odma_service.pool.openers import NOBODY, Openers, Opening
from odma_service.values import (
    Allocate,
    Caller,
    Extend,
    Free,
    Freed,
    Moves,
    Place,
    PlaneGroup,
    Reason,
    Refusal,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from odma_service.pool.policy import PolicyRecord
    from odma_service.values import Answer, Batch, Predicted, Quantiles, Result

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", re.ASCII)
NAME_RULE = "1 to 64 characters of [A-Za-z0-9._-], not starting with a dot"
MOST_EPOCH = 2**53 - 1
OPENERS = "openers"
"""Their key beside those of a spec."""


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """What an owner said when it opened the pool. capacity_tokens becomes whole blocks.

    `owner` is the identity that opened it, "" where nobody was asked who he is.

    A field that breaks its rule is an InvalidError that names it.
    """

    name: str
    open_id: str
    geometry: Geometry
    capacity_tokens: int
    model_length_tokens: int
    moves: Moves
    device: Device = PRESETS["mlu370-x4"]
    single_ordered_stream: bool = False
    copies_may_overlap: bool = False
    block_tokens: int = 16
    ttl_seconds: int = 60
    retention_seconds: int = 86_400
    max_regions: int = 1024
    max_ops: int = 1024
    max_copies: int = 1024
    owner: str = ""
    granule_tokens: int = 0
    reads_two_runs: bool = False

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise InvalidError("name", NAME_RULE)
        if not 1 <= len(self.open_id.encode(errors="replace")) <= 64:
            raise InvalidError("open_id", "1 to 64 bytes")
        if self.owner and not NAME.fullmatch(self.owner):
            raise InvalidError("owner", NAME_RULE)
        for field, least, most in (
            ("model_length_tokens", 1, MOST_MODEL_LENGTH_TOKENS),
            ("ttl_seconds", 1, 86_400),
            ("retention_seconds", self.ttl_seconds, 2_592_000),
        ):
            self._insist_within(field, least, most)
        self._arena_geometry(blocks=1).check()  # blocks follow from capacity_tokens
        most_tokens = min(MOST_CAPACITY_TOKENS, MOST_BLOCKS * self.block_tokens)
        self._insist_within("capacity_tokens", self.block_tokens, most_tokens)
        if self.moves not in set(Moves):
            raise InvalidError("moves", "NONE, OWN_GROWTH or ANY")
        if self.reads_two_runs and not self.granule_tokens:
            raise InvalidError("reads_two_runs", "needs granule_tokens")
        self.geometry.check_alignment(self.block_tokens)
        whole = self.capacity_tokens // self.block_tokens * self.block_tokens
        object.__setattr__(self, "capacity_tokens", whole)

    def _insist_within(self, field: str, least: int, most: int) -> None:
        value = getattr(self, field)
        if not isinstance(value, int) or not least <= value <= most:
            raise InvalidError(field, f"{least:,} to {most:,}, not {value!r}")

    @property
    def engine_kind(self) -> tuple[bool, bool]:
        """What a policy has to fit: may every region move, and on one ordered stream."""
        any_moves = self.moves == Moves.ANY
        return any_moves, any_moves and self.single_ordered_stream

    def arena_geometry(self) -> ArenaGeometry:
        """Return what has to be the same for books to be used again."""
        return self._arena_geometry(self.capacity_tokens // self.block_tokens)

    def _arena_geometry(self, blocks: int) -> ArenaGeometry:
        return ArenaGeometry(
            blocks=blocks,
            block_tokens=self.block_tokens,
            max_regions=self.max_regions,
            max_ops=self.max_ops,
            max_copies=self.max_copies,
            model_length_tokens=self.model_length_tokens,
            digest=self.geometry.digest(self.block_tokens),
            granule_tokens=self.granule_tokens,
        )

    def engine(self) -> EngineRecord:
        """Return what the engine can do, with the prices of its copies."""
        return EngineRecord(
            moves=self.moves,
            single_ordered_stream=self.single_ordered_stream,
            copies_may_overlap=self.copies_may_overlap,
            planes=self.geometry.plane_count,
            descriptor_seconds=self.device.descriptor_seconds,
            token_seconds=self.device.token_seconds(self.geometry.bytes_per_token),
            reads_two_runs=self.reads_two_runs,
        )

    def to_json(self) -> bytes:
        """Return the spec as the text that its books keep."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["geometry"] = [astuple(group) for group in self.geometry.planes]
        values["device"] = astuple(self.device)
        return json.dumps(values, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Return the spec that to_json wrote. Raises BooksMismatchError for another text."""
        try:
            values = json.loads(text)
            values.pop(OPENERS, None)
            values["geometry"] = Geometry(tuple(PlaneGroup(*g) for g in values["geometry"]))
            values["device"] = Device(*values["device"])
            values["moves"] = Moves(values["moves"])
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BooksMismatchError(f"the books describe no pool: {error}") from None


class ClassHistory(NamedTuple):
    """What is known about one request class. output_quantiles None: too little."""

    request_class: str
    histogram: Histogram
    output_quantiles: Quantiles | None


class Pool:
    """The books of one pool. epoch 0: nobody owns it."""

    def __init__(self, arena: Arena, spec: PoolSpec, openers: Openers) -> None:
        """Use Pool.create or Pool.attach."""
        arena.name = spec.name
        report = arena.report()
        self._arena = arena
        self._spec = spec
        self._openers = openers
        self._epoch = report.epoch
        self._owner = report.owner
        self._last_seq = report.seq
        self._policy = arena.policy()

    @classmethod
    def create(
        cls,
        path: Path,
        spec: PoolSpec,
        epoch: int,
        boot_id: str,
        policy: PolicyRecord,
        openers: Openers = NOBODY,
    ) -> Self:
        """Make books at `path` and begin an epoch. With an owner among `openers` it is fenced.

        Raises BooksError if there is a file already, BooksSpaceError without room for one,
        InvalidError for an epoch that is not 1 to 2^53 - 1. Then no file was made.
        """
        _insist_next(epoch, 0)
        arena = Arena.create(path, spec.arena_geometry())
        try:
            arena.set_policy(policy)
            _open_epoch(arena, spec, epoch, boot_id, openers)
            return cls(arena, spec, openers)
        except BaseException:
            arena.close()
            path.unlink()
            raise

    @classmethod
    def attach(cls, path: Path, boot_id: str, expected: PoolSpec | None = None) -> Self:
        """Take up the books at `path`, after any end of the process that had them.

        An epoch of another boot is over: device memory does not survive one. Raises
        PoolNotFoundError without a file, BooksMismatchError also if the books were made
        for another geometry than the `expected` one's, or a BooksError. See set_aside.
        """
        geometry = None if expected is None else expected.arena_geometry()
        arena = Arena.attach(path, geometry, boot_id)
        try:
            description = arena.description()
            return cls(arena, PoolSpec.from_json(description), _openers_of(description))
        except BaseException:
            arena.close()
            raise

    def close(self) -> None:
        """Give the file back. The epoch goes on and can be attached again."""
        self._arena.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- epochs ---

    @property
    def spec(self) -> PoolSpec:
        """What the owner of the running epoch, or of the last one, said."""
        return self._spec

    @property
    def epoch(self) -> int:
        """The running epoch, 0 if there is none."""
        return self._epoch

    @property
    def last_seq(self) -> int:
        """The last answered seq of the epoch, 0 at its start."""
        return self._last_seq

    @property
    def owner(self) -> int:
        """The owner number of the epoch. 0: it is not fenced."""
        return self._owner

    @property
    def openers(self) -> Openers:
        """Who has opened the pool."""
        return self._openers

    def insist_new(self, opening: Opening, seen: str | None) -> None:
        """Raise StaleOpenError or FencedError for an OpenPool that is late.

        What is `seen` of a pool differs before and after each start and end of an epoch, and
        with each owner number.
        """
        now = f"{self._epoch}.{self._owner}" if self._epoch else f"{self.report().last_epoch}"
        self._openers.check(opening, seen, name=self._spec.name, owner=self._owner, now=now)

    def insist(self, caller: Caller) -> None:
        """Raise EpochError, FencedError or UnfencedError unless `caller` is the owner."""
        if caller.epoch != self._epoch:
            raise EpochError(self._spec.name, caller.epoch)
        if caller.owner != self._owner:
            kind = FencedError if caller.owner else UnfencedError
            raise kind(self._spec.name, self._owner)

    def own(self, opening: Opening) -> None:
        """Give the epoch another owner number: what carries an earlier one is refused."""
        openers = self._openers.owned_by(opening, ends_another=True)
        self._describe(self._owner + 1, openers)

    def refuse(self, opening: Opening) -> None:
        """Remember an OpenPool that was refused."""
        self._describe(self._owner, self._openers.refused(opening))

    def _describe(self, owner: int, openers: Openers) -> None:
        self._arena.describe(owner, _description(self._spec, openers))
        self._owner = owner
        self._openers = openers

    def spend(self, caller: Caller) -> None:
        """Use up the number of a call that was refused: if it comes again it stays refused."""
        self._arena.spend(caller)

    def open_epoch(
        self,
        spec: PoolSpec,
        epoch: int,
        boot_id: str,
        policy: PolicyRecord | None = None,
        openers: Openers = NOBODY,
    ) -> None:
        """Begin an epoch with empty books; a running one ends. What was learnt stays.

        `policy` None leaves the one in force. With an owner among `openers` the epoch is
        fenced. Raises BooksMismatchError if `spec` has
        another geometry, InvalidError unless `epoch` is above every earlier one.
        """
        if spec.arena_geometry() != self._arena.geometry:
            raise BooksMismatchError(f"the books of {self._spec.name!r} have another geometry")
        _insist_next(epoch, self._arena.report().last_epoch)
        if policy is not None:
            self.set_policy(policy)  # first, so that no epoch ever runs without it
        self._owner = _open_epoch(self._arena, spec, epoch, boot_id, openers)
        self._arena.name = spec.name
        self._spec = spec
        self._openers = openers
        self._epoch = epoch
        self._last_seq = 0

    def close_epoch(self, caller: Caller | int) -> None:
        """End the epoch: nothing is enqueued any more that uses the pool's memory.

        Raises EpochError if it is not the one running.
        """
        self._arena.end_epoch(caller)
        self._epoch = self._owner = 0
        self._last_seq = 0

    # --- the decode step ---

    def replay(self, epoch: Caller | int, batch: Batch) -> Answer | None:
        """Return the stored answer of a batch that was answered before, else None.

        Raises what apply would raise for its epoch and seq.
        """
        return self._arena.replay(epoch, batch)

    def apply(
        self,
        epoch: Caller | int,
        batch: Batch,
        predictions: Sequence[Predicted | None] | None = None,
    ) -> Answer:
        """Do the operations of one decode step, in order: all of it or none of it.

        The same seq with the same body gets the stored answer. `predictions` has quantiles
        of output tokens, or None, for each operation. Outcomes of single operations are
        results. Raises InvalidError for a bad batch, EpochError, SeqChangedError,
        SeqOldError, SeqGapError, BooksCorruptError.
        """
        answer = self._arena.apply(epoch, batch, predictions)
        self._last_seq = answer.seq
        return answer

    # --- one operation ---

    def allocate(
        self, epoch: Caller | int, op: Allocate, prediction: Predicted | None = None
    ) -> Place:
        """Reserve a region, or return the one that lives under the same request id.

        Never copies. Raises RefusedError, InvalidError, EpochError.
        """
        return _placed(op, self._arena.unary(epoch, op, prediction))

    def extend(self, epoch: Caller | int, op: Extend) -> Place:
        """Grow a region in place. Raises RefusedError, InvalidError, HandleError, EpochError."""
        return _placed(op, self._arena.unary(epoch, op))

    def free(self, epoch: Caller | int, op: Free) -> Freed:
        """Give a region back that no enqueued work uses; now or before, both are fine.

        Raises HandleError for a handle never issued, InvalidError, EpochError.
        """
        result = self._arena.unary(epoch, op)
        if isinstance(result, Refusal):
            raise _error_of(op, result)
        assert isinstance(result, Freed)
        return result

    def reconcile(
        self, epoch: Caller | int, handles: Sequence[int], completed_seq: int = 0
    ) -> tuple[list[Place], list[int]]:
        """Free every region that is not listed.

        Return where the listed ones lie, in the order given (length_tokens 0: it is dead),
        and the handles that were freed. Unless completed_seq is the last answered seq nothing
        is kept any more for reuse. Raises InvalidError, EpochError.
        """
        return self._arena.reconcile(epoch, handles, completed_seq)

    # --- policy ---

    def policy(self) -> PolicyRecord:
        """Return the policy in force."""
        return self._policy

    def set_policy(
        self,
        policy: PolicyRecord,
        expected_version: int | None = None,
        caller: Caller | None = None,
    ) -> int:
        """Install a policy and return its version. Regions stay as they are.

        Raises VersionError unless expected_version, if given, is in force. `caller` None:
        nobody who is fenced.
        """
        self.check_version(expected_version)
        version = self._arena.set_policy(policy, caller=caller)
        self._policy = replace(policy, version=version)
        return version

    def check_version(self, expected_version: int | None) -> None:
        """Raise VersionError unless expected_version, if given, is in force."""
        if expected_version is None:
            return
        if expected_version != self._policy.version:
            raise VersionError(expected_version, self._policy.version)

    # --- reading ---

    def report(self) -> ArenaReport:
        """Return the books in numbers."""
        return self._arena.report()

    def regions(self, from_token: int = 0, room: int = 1000) -> list[RegionEntry]:
        """List what starts at or after `from_token` in address order, at most `room`."""
        return self._arena.regions(from_token, room)

    @property
    def most_entries(self) -> int:
        """Entries that regions() may list."""
        return self._arena.geometry.most_entries

    def tenants(self) -> list[TenantUse]:
        """Return what each tenant of the policy holds, in the policy's order."""
        return self._arena.tenants()

    def bucket_regions(self, limits_tokens: Sequence[int]) -> list[int]:
        """Count the live regions under each of these limits, rounded up to blocks."""
        block_tokens, lengths = self._spec.block_tokens, self._arena.lengths()
        limits = [-(-limit // block_tokens) * block_tokens for limit in limits_tokens]
        return [int(((lengths > a) & (lengths <= b)).sum()) for a, b in pairwise((0, *limits))]

    def check(self) -> None:
        """Raise BooksCorruptError with the broken rule unless the books keep every rule."""
        self._arena.check()

    def bins(self) -> NDArray[np.uint32]:
        """Return the upper ends of all histograms' bins in tokens."""
        return self._arena.bins()

    def histogram(self) -> Histogram:
        """Return the lengths of all completions."""
        return self._arena.histogram(CLASS_POOL)

    def completions(self) -> list[Completion]:
        """Return the last completions of all classes, at most 256, oldest first."""
        return self._arena.completions(CLASS_POOL)

    def classes(self) -> list[ClassHistory]:
        """Return what is known about each request class that has a name or completions."""
        named = [self.class_history(index) for index in range(len(self._arena.class_names()))]
        others = self.class_history(CLASS_OTHER)
        return named + [others] * (others.histogram.completions > 0)

    def quantiles(self, request_class: str, more_than: int = 0) -> Quantiles | None:
        """Return quantiles of a class's output tokens, given that they exceed `more_than`.

        A class with fewer than 32 completions uses the pool's; None if that has fewer too.
        """
        index = self._arena.class_index(request_class)
        known = self._arena.quantiles(index, more_than)
        return None if known is None else known[0]

    def scope(self, request_class: str, enough: int) -> tuple[str | None, int]:
        """Return the class if it has `enough` completions, else None, which stands for all.

        And how many completions it, or all, have had.
        """
        index = self._arena.class_index(request_class)
        ever = self._arena.ring(index)[1]
        if index != CLASS_POOL and ever >= enough:
            return request_class, ever
        return None, self._arena.ring(CLASS_POOL)[1]

    def shown(self, request_class: str | None) -> tuple[NDArray[np.void], NDArray[np.void], int]:
        """Return the last completions of a class, its running requests, and how many it had.

        Arrays of odma_completion, the completions oldest first. None: of all classes.
        """
        index = CLASS_POOL if request_class is None else self._arena.class_index(request_class)
        ring, ever = self._arena.ring(index)
        return ring, self._arena.running(index), ever

    def class_history(self, index: int) -> ClassHistory:
        """Return what is known about the class of an index below report().classes."""
        known = self._arena.quantiles(index)
        return ClassHistory(
            self._arena.class_name(index), self._arena.histogram(index), known and known[0]
        )


def _description(spec: PoolSpec, openers: Openers) -> bytes:
    """Return the text of the books about a pool: its spec, and who has opened it."""
    text = spec.to_json()
    return (
        text
        if openers == NOBODY
        else b'%s,"%s":%s}'
        % (
            text[:-1],
            OPENERS.encode(),
            openers.to_json(),
        )
    )


def _openers_of(description: bytes) -> Openers:
    values = json.loads(description)
    return Openers.from_values(values[OPENERS]) if OPENERS in values else NOBODY


def _open_epoch(arena: Arena, spec: PoolSpec, epoch: int, boot_id: str, openers: Openers) -> int:
    """Begin an epoch, fenced if its owner has an instance. Return its owner number."""
    description = _description(spec, openers)
    arena.open_epoch(epoch, spec.engine(), boot_id, description)
    if not openers.owner.instance:
        return 0
    arena.describe(1, description)  # nobody knows the epoch yet, so it is not too late
    return 1


def _insist_next(epoch: int, last_epoch: int) -> None:
    if not last_epoch < epoch <= MOST_EPOCH:
        raise InvalidError("epoch", f"{last_epoch + 1} to 2^53 - 1, not {epoch}")


def _placed(op: Allocate | Extend, result: Result) -> Place:
    if isinstance(result, Refusal):
        raise _error_of(op, result)
    assert isinstance(result, Place)
    return result


def _error_of(
    op: Allocate | Extend | Free, refusal: Refusal
) -> InvalidError | HandleError | RefusedError:
    field, _, rule = refusal.field.partition(": ")
    if refusal.reason == Reason.INVALID:
        return InvalidError(f"{type(op).__name__.lower()}.{field}", rule)
    if refusal.reason == Reason.NOT_FOUND and not isinstance(op, Allocate):
        return HandleError(op.handle, rule)
    return RefusedError(refusal)
