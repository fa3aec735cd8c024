"""One arena: a pool's books, in tokens.

A wrapper turns a status into Python and adds nothing else. An Arena belongs to one thread
at a time, but for its readings: until it is closed any thread may read. It belongs to the process
that made it: a forked child has to attach for itself.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np

from odma_service._native._odma import ffi, lib
from odma_service._native.operations import (
    batch_error,
    check_numbers,
    copies_from,
    op_struct,
    ops_array,
    places_from,
    results_from,
    used_array,
)
from odma_service._native.records import (
    COMPLETION,
    ArenaGeometry,
    ArenaReport,
    Completion,
    Counters,
    EngineRecord,
    Histogram,
    PolicyRecord,
    Recovery,
    RegionEntry,
    Reuse,
    TenantUse,
    policy_struct,
)
from odma_service._native.rules import broken_rule, new_reason, sentence_of
from odma_service.errors import (
    BooksCorruptError,
    BooksError,
    BooksForeignError,
    BooksLockedError,
    BooksMismatchError,
    BooksSpaceError,
    BooksUnavailableError,
    EpochError,
    FencedError,
    InvalidError,
    LateError,
    OdmaError,
    PoolNotFoundError,
    SeqChangedError,
    SeqGapError,
    SeqOldError,
    UnfencedError,
    VersionError,
)
from odma_service.values import Answer, Caller, Moves, Overflow, Start, TenantShare

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from odma_service.values import Batch, Op, Place, Predicted, Quantiles, Result

MOST_BLOCKS: int = lib.ODMA_MAX_BLOCKS
MOST_CAPACITY_TOKENS: int = lib.ODMA_MAX_TOKENS
MOST_LIMITS: int = lib.ODMA_LIMITS
LEARNT_ENOUGH: int = lib.ODMA_LEARNT_ENOUGH
"""Completions from which lengths are known."""

CLASS_POOL: int = lib.ODMA_CLASS_POOL
"""Index of all request classes together."""

_STATE_AND_LENGTH = np.dtype(
    {
        "names": ["state", "length"],
        "formats": [np.uint32, np.uint32],
        "offsets": [ffi.offsetof("odma_region", name) for name in ("state", "length")],
        "itemsize": ffi.sizeof("odma_region"),
    }
)

CLASS_OTHER: int = lib.ODMA_CLASS_OTHER
"""Index of the request classes beyond the 64th."""

OTHER_CLASS_NAME = "(other)"

_BOOKS_ERRORS: dict[int, type[BooksError]] = {
    lib.ODMA_LOCKED: BooksLockedError,
    lib.ODMA_FOREIGN: BooksForeignError,
    lib.ODMA_MISMATCH: BooksMismatchError,
    lib.ODMA_CORRUPT: BooksCorruptError,
    lib.ODMA_BROKEN: BooksCorruptError,
    lib.ODMA_IO: BooksUnavailableError,
    lib.ODMA_EXISTS: BooksUnavailableError,
}


_NOBODY = Caller(0)


def own_faults() -> None:
    """Take SIGBUS for this process: a page of a pool's file that fails breaks that arena only.

    For a service: a library must not own a signal.
    """
    if lib.odma_own_faults() != 0:
        raise OSError(ffi.errno, os.strerror(ffi.errno))


class Arena:
    """The books of one pool, mapped from a file that this process has locked."""

    def __init__(self, path: Path, arena: Any) -> None:
        """Use Arena.create or Arena.attach."""
        self.path = path
        self.name = path.stem
        self._arena = arena
        geometry = ffi.new("odma_geometry *")
        self._insist(lib.odma_arena_geometry(arena, geometry))
        self.geometry = ArenaGeometry(*_values(geometry, ArenaGeometry))
        self._block_tokens = self.geometry.block_tokens
        self._class_names: list[str] = []

        self._batch = ffi.new("odma_batch *")
        self._answer = ffi.new("odma_answer *")
        self._results = ffi.new("odma_result[]", self.geometry.max_ops)
        self._copies = ffi.new("odma_copy[]", self.geometry.max_copies)
        most_moved = self.geometry.max_copies
        if self.geometry.granule_tokens:
            most_moved += self.geometry.max_regions
        self._moved = ffi.new("odma_place[]", most_moved)
        self._moved_reused = ffi.new("odma_reused[]", most_moved)
        self._answer.results = self._results
        self._answer.copies = self._copies
        self._answer.moved = self._moved
        self._answer.moved_reused = self._moved_reused

    @classmethod
    def create(cls, path: Path, geometry: ArenaGeometry) -> Self:
        """Make the file at `path`, with no epoch running, and attach it.

        Raises InvalidError for a bad geometry, BooksSpaceError without room, BooksError.
        """
        geometry.check()
        arena, reason = ffi.new("odma_arena **"), new_reason()
        wanted = ffi.new("odma_geometry *", geometry._asdict())
        status = lib.odma_arena_create(os.fsencode(path), wanted, arena, reason)
        if status != lib.ODMA_OK:
            raise _file_error(status, path, reason)
        try:
            return cls(path, arena[0])
        except MemoryError:
            path.unlink()
            raise

    @classmethod
    def attach(
        cls, path: Path, geometry: ArenaGeometry | None = None, boot_id: str | None = None
    ) -> Self:
        """Attach the file at `path` and finish what a killed process left half done.

        An epoch of another boot is ended. Raises PoolNotFoundError, or the BooksError that says
        why the file cannot be used; the file is as before.
        """
        arena, reason = ffi.new("odma_arena **"), new_reason()
        wanted = ffi.NULL if geometry is None else ffi.new("odma_geometry *", geometry._asdict())
        boot = ffi.NULL if boot_id is None else boot_id.encode()
        status = lib.odma_arena_attach(os.fsencode(path), wanted, boot, arena, reason)
        if status == lib.ODMA_NO_SPACE:  # for books that there are: it may come back
            status = lib.ODMA_IO
        if status != lib.ODMA_OK:
            raise _file_error(status, path, reason)
        return cls(path, arena[0])

    def close(self) -> None:
        """Give back the memory and the lock; the file stays. May be called again."""
        lib.odma_arena_close(self._arena)
        self._arena = ffi.NULL

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if lib is not None and getattr(self, "_arena", None) is not None:
            self.close()

    # --- epochs ---

    def open_epoch(
        self, epoch: int, engine: EngineRecord, boot_id: str, description: bytes
    ) -> None:
        """Begin an epoch with empty books; a running one ends. What was learnt stays."""
        try:
            record = ffi.new("odma_engine *", engine._asdict())
            status = lib.odma_arena_open_epoch(
                self._arena, epoch, record, boot_id.encode(), description, len(description)
            )
        except (OverflowError, TypeError) as error:
            raise InvalidError("epoch", str(error)) from None
        if status == lib.ODMA_INVALID and self._arena:
            raise InvalidError("epoch", "above every earlier one and below 2^53, a sound engine")
        self._insist(status)

    def describe(self, owner: int, description: bytes) -> None:
        """Change the description and the owner number of the epoch: both or neither."""
        status = lib.odma_arena_describe(self._arena, owner, description, len(description))
        self._insist(status, invalid="owner")

    def spend(self, caller: Caller) -> None:
        """Use up the number of a call that was refused: if it comes again it stays refused."""
        self._insist(lib.odma_arena_spend(self._arena, caller), caller)

    def end_epoch(self, caller: Caller | int) -> None:
        """End the epoch. Raises EpochError if it is not the one running."""
        caller = Caller.of(caller)
        self._insist(lib.odma_arena_end_epoch(self._arena, caller), caller)

    @property
    def engine(self) -> EngineRecord:
        """The engine of the running epoch, or of the last one."""
        engine = ffi.new("odma_engine *")
        self._insist(lib.odma_arena_engine(self._arena, engine))
        return EngineRecord(
            Moves(engine.moves),
            bool(engine.single_ordered_stream),
            bool(engine.copies_may_overlap),
            engine.planes,
            engine.descriptor_seconds,
            engine.token_seconds,
            bool(engine.reads_two_runs),
        )

    def description(self) -> bytes:
        """Return the description given with the running epoch."""
        description = ffi.new("char[]", lib.ODMA_DESCRIPTION_BYTES)
        size = ffi.new("uint32_t *")
        self._insist(lib.odma_arena_description(self._arena, description, size))
        return bytes(ffi.buffer(description, size[0]))

    # --- policy ---

    def policy(self) -> PolicyRecord:
        """Return the policy in force."""
        policy = ffi.new("odma_policy *")
        self._insist(lib.odma_arena_policy(self._arena, policy))
        return PolicyRecord(
            name=_text(policy.name),
            start=Start(policy.start),
            overflow=Overflow(policy.overflow),
            step_tokens=policy.step_tokens,
            limits_tokens=tuple(policy.limits_tokens[0 : policy.limit_count]),
            overflow_risk=policy.overflow_risk,
            safety_share=policy.safety_share,
            unsure_ratio=policy.unsure_ratio,
            growth=policy.growth,
            tenant_share=policy.tenant_share,
            max_copy_tokens=policy.max_copy_tokens,
            tenants=tuple(
                TenantShare(_text(tenant.name), tenant.guaranteed_share, tenant.maximum_share)
                for tenant in policy.tenants[0 : policy.tenant_count]
            ),
            version=policy.version,
        )

    def set_policy(
        self, policy: PolicyRecord, expected_version: int = 0, caller: Caller | None = None
    ) -> int:
        """Install a policy and return its version.

        Raises VersionError unless expected_version, if not 0, is in force.
        """
        record = policy_struct(policy)
        fence = ffi.NULL if caller is None else ffi.new("odma_caller *", caller)
        status = lib.odma_arena_set_policy(self._arena, fence, record, expected_version)
        if status == lib.ODMA_VERSION:
            raise VersionError(expected_version, self.policy().version)
        self._insist(status, caller or _NOBODY, invalid="policy")
        return int(record.version)

    # --- the decode step ---

    def replay(self, caller: Caller | int, batch: Batch) -> Answer | None:
        """Return the stored answer if `batch` has one, None if apply would do it."""
        caller = Caller.of(caller)
        inputs = self._fill_batch(caller, batch, None)
        status = lib.odma_arena_replay(self._arena, self._batch, self._answer)
        del inputs
        if status == lib.ODMA_NOT_FOUND:
            return None
        self._insist_batch(status, caller, batch)
        return self._read_answer(batch)

    def apply(
        self,
        caller: Caller | int,
        batch: Batch,
        predictions: Sequence[Predicted | None] | None = None,
    ) -> Answer:
        """Do the operations of one decode step: all of it or none of it.

        `predictions` has one entry for each operation. Raises InvalidError for a bad
        batch, EpochError, SeqChangedError, SeqOldError, SeqGapError, and for a caller with
        an owner number FencedError, LateError.
        """
        caller = Caller.of(caller)
        inputs = self._fill_batch(caller, batch, predictions)
        status = lib.odma_arena_apply(self._arena, self._batch, self._answer)
        del inputs
        self._insist_batch(status, caller, batch)
        return self._read_answer(batch)

    def unary(self, caller: Caller | int, op: Op, prediction: Predicted | None = None) -> Result:
        """Do one operation outside of batches, without copies."""
        operation = op_struct(op, prediction)
        result = ffi.new("odma_result *")
        caller = Caller.of(caller)
        status = lib.odma_arena_unary(self._arena, caller, operation, result)
        self._insist(status, caller)
        return results_from(result, [op], self._block_tokens)[0]

    def reconcile(
        self, caller: Caller | int, handles: Sequence[int], completed_seq: int = 0
    ) -> tuple[list[Place], list[int]]:
        """Free every live region that is not listed, and every waiting run.

        Return where the listed ones lie, in the order given (length 0: it is dead), and
        the handles that were freed. Unless completed_seq is the last answered seq, kept runs
        are given up and no key stands any more.
        """
        try:
            listed = ffi.new("uint64_t[]", list(handles))
        except (OverflowError, TypeError) as error:
            raise InvalidError("handles", str(error)) from None
        kept = ffi.new("odma_place[]", len(handles))
        freed = ffi.new("uint64_t[]", self.geometry.max_regions)
        count = ffi.new("uint32_t *")
        caller = Caller.of(caller)
        status = lib.odma_arena_reconcile(
            self._arena, caller, completed_seq, listed, len(handles), kept, freed, count
        )
        self._insist(status, caller, invalid="handles")
        reused = ffi.new("odma_reused[]", len(handles))
        return places_from(kept, reused, len(handles), self._block_tokens), list(
            freed[0 : count[0]]
        )

    def _fill_batch(
        self, caller: Caller, batch: Batch, predictions: Sequence[Predicted | None] | None
    ) -> tuple[Any, Any]:
        """Fill the struct; what it points to lives as long as the returned arrays."""
        for field, values, most in (
            ("used", batch.used, self.geometry.max_regions),
            ("ops", batch.ops, self.geometry.max_ops),
        ):
            if len(values) > most:
                raise InvalidError(field, f"at most {most:,}, not {len(values):,}")
        used, ops = used_array(batch.used), ops_array(batch.ops, predictions)
        struct = self._batch
        try:
            struct.epoch, struct.owner, struct.number = caller
            struct.seq = batch.seq
            struct.completed_seq = batch.completed_seq
            struct.max_copy_tokens = batch.max_copy_tokens or 0
        except (OverflowError, TypeError):
            check_numbers("", batch)
            raise InvalidError("epoch", f"must be 0 to 2^64 - 1, not {caller.epoch!r}") from None
        struct.given = 0 if batch.max_copy_tokens is None else lib.ODMA_GIVEN_MAX_COPY
        struct.pass_refused = bool(batch.pass_refused)
        struct.used_count = len(batch.used)
        struct.op_count = len(batch.ops)
        struct.used = used
        struct.ops = ops
        return used, ops

    def _read_answer(self, batch: Batch) -> Answer:
        answer = self._answer
        return Answer(
            answer.seq,
            bool(answer.replayed),
            results_from(self._results, batch.ops, self._block_tokens),
            copies_from(self._copies, answer.copy_count),
            places_from(self._moved, self._moved_reused, answer.moved_count, self._block_tokens),
            answer.policy_version,
        )

    # --- reading ---

    def report(self) -> ArenaReport:
        """Return the books in numbers."""
        report = ffi.new("odma_report *")
        self._insist(lib.odma_arena_report(self._arena, report))
        block_tokens = self._block_tokens
        return ArenaReport(
            epoch=report.epoch,
            last_epoch=report.last_epoch,
            seq=report.seq,
            completed_seq=report.completed_seq,
            owner=report.owner,
            number=report.number,
            live=report.live,
            waiting=report.waiting,
            free_runs=report.free_runs,
            free_tokens=report.free_blocks * block_tokens,
            awaiting_completion_tokens=report.waiting_blocks * block_tokens,
            largest_run_tokens=report.largest_run * block_tokens,
            reserved_tokens=report.reserved_blocks * block_tokens,
            safety_tokens=report.safety_blocks * block_tokens,
            used_tokens=report.used_tokens,
            classes=report.classes,
            rebooted=bool(report.rebooted),
            recovery=Recovery(report.recovery),
            counters=Counters(*_values(report.counters, Counters)),
            reuse=Reuse(*_values(report.reuse, Reuse)),
        )

    def tenants(self) -> list[TenantUse]:
        """Return what each tenant of the policy holds, in the policy's order."""
        uses, count = ffi.new("odma_tenant_use[]", lib.ODMA_TENANTS), ffi.new("uint32_t *")
        self._insist(lib.odma_arena_tenants(self._arena, uses, count))
        unit = self._block_tokens
        return [
            TenantUse(
                _text(use.name),
                use.regions,
                use.held * unit,
                use.guaranteed * unit,
                use.maximum * unit,
                use.claimed * unit,
            )
            for use in uses[0 : count[0]]
        ]

    def regions(self, from_token: int = 0, room: int = 1000) -> list[RegionEntry]:
        """List entries that start at or after `from_token` in address order, at most `room`."""
        entries = ffi.new("odma_region[]", room)
        count = ffi.new("uint32_t *")
        first_block = -(-from_token // self._block_tokens)
        status = lib.odma_arena_regions(self._arena, first_block, entries, room, count)
        self._insist(status)
        return [self._region(entry) for entry in entries[0 : count[0]]]

    def lengths(self) -> NDArray[np.uint32]:
        """Return the lengths of the live regions in tokens, in address order."""
        room = self.geometry.most_entries
        entries = ffi.new("odma_region[]", room)
        count = ffi.new("uint32_t *")
        self._insist(lib.odma_arena_regions(self._arena, 0, entries, room, count))
        found = np.frombuffer(ffi.buffer(entries), _STATE_AND_LENGTH)[: count[0]]
        blocks: NDArray[np.uint32] = found["length"][found["state"] == lib.ODMA_REGION_LIVE]
        return blocks * np.uint32(self._block_tokens)

    def check(self) -> None:
        """Raise BooksCorruptError with the broken rule unless the books keep every rule."""
        reason = new_reason()
        self._insist(lib.odma_arena_check(self._arena, reason), reason=reason)

    # --- what was learnt ---

    def class_names(self) -> list[str]:
        """Return the names of the request classes, by index."""
        name = ffi.new("char[]", lib.ODMA_NAME_BYTES)
        names = self._class_names.copy()  # another thread may do the same
        while len(names) < lib.ODMA_CLASSES:
            status = lib.odma_arena_class(self._arena, len(names), name)
            if status == lib.ODMA_NOT_FOUND:
                break
            self._insist(status)
            names.append(_text(name))
        self._class_names = names  # classes are added, never renamed
        return names.copy()

    def class_index(self, name: str) -> int:
        """Return the index a class has or would share: CLASS_POOL if it is new.

        A name that no class can have is new for ever.
        """
        data = name.encode(errors="replace")
        if len(data) > lib.ODMA_NAME_BYTES or b"\0" in data:
            return CLASS_POOL
        padded = ffi.new("char[]", data.ljust(lib.ODMA_NAME_BYTES, b"\0"))
        index = ffi.new("uint32_t *")
        self._insist(lib.odma_arena_class_index(self._arena, padded, index))
        return int(index[0])

    def histogram(self, class_index: int = CLASS_POOL) -> Histogram:
        """Return the lengths that a class has had."""
        histogram = ffi.new("odma_histogram *")
        status = lib.odma_arena_histogram(self._arena, class_index, histogram)
        self._insist(status, invalid="class_index")
        return Histogram(
            histogram.completions,
            *(
                np.frombuffer(ffi.buffer(getattr(histogram, field)), np.float64).copy()
                for field in Histogram._fields[1:]
            ),
        )

    def bins(self) -> NDArray[np.uint32]:
        """Return the upper ends of the histogram bins in tokens."""
        upper = ffi.new("uint32_t[]", lib.ODMA_BINS)
        self._insist(lib.odma_arena_bins(self._arena, upper))
        return np.frombuffer(ffi.buffer(upper), np.uint32).copy()

    def completions(self, class_index: int = CLASS_POOL) -> list[Completion]:
        """Return the last completions of a class, oldest first."""
        return [
            Completion(
                None if entry["quantiles"][0] < 0 else tuple(entry["quantiles"].tolist()),
                int(entry["prompt_tokens"]),
                int(entry["output_tokens"]),
                bool(entry["censored"]),
            )
            for entry in self.ring(class_index)[0]
        ]

    def ring(self, class_index: int = CLASS_POOL) -> tuple[NDArray[np.void], int]:
        """Return the last completions as an array of odma_completion, oldest first.

        And how many there have been, which changes whenever the array does.
        """
        ring = np.zeros(lib.ODMA_RING, COMPLETION)
        count, ever = ffi.new("uint32_t *"), ffi.new("uint64_t *")
        entries = ffi.from_buffer("odma_completion[]", ring)
        status = lib.odma_arena_completions(self._arena, class_index, entries, count, ever)
        self._insist(status, invalid="class_index")
        return ring[: count[0]], ever[0]

    def running(self, class_index: int = CLASS_POOL) -> NDArray[np.void]:
        """Return the running requests of a class so far, as an array of odma_completion."""
        running = np.zeros(self.geometry.max_regions, COMPLETION)
        count = ffi.new("uint32_t *")
        entries = ffi.from_buffer("odma_completion[]", running)
        room = len(running)
        status = lib.odma_arena_running(self._arena, class_index, entries, room, count)
        self._insist(status, invalid="class_index")
        return running[: count[0]]

    def quantiles(self, class_index: int, more_than: int = 0) -> tuple[Quantiles, float] | None:
        """Return quantiles of a class's output tokens, given that they exceed `more_than`.

        And the weight they rest on; None if fewer than 32 completions are known.
        """
        quantiles, weight = ffi.new("float[]", lib.ODMA_QUANTILES), ffi.new("double *")
        status = lib.odma_arena_quantiles(self._arena, class_index, more_than, quantiles, weight)
        if status == lib.ODMA_NOT_FOUND:
            return None
        self._insist(status, invalid="class_index")
        return tuple(quantiles), weight[0]

    def _region(self, entry: Any) -> RegionEntry:
        live = entry.state == lib.ODMA_REGION_LIVE
        return RegionEntry(
            live=live,
            kept=entry.state == lib.ODMA_REGION_KEPT,
            handle=entry.handle,
            start_token=entry.start * self._block_tokens,
            length_tokens=entry.length * self._block_tokens,
            used_tokens=entry.used_tokens,
            shareable_tokens=entry.shareable_tokens,
            awaits_seq=entry.awaits_seq,
            birth=entry.birth,
            prompt_tokens=entry.prompt_tokens,
            generated_tokens=entry.generated_tokens,
            max_total_tokens=entry.max_total_tokens,
            request_class=self.class_name(entry.class_index) if live else "",
            request_id=_text(entry.request_id),
        )

    def class_name(self, index: int) -> str:
        """Return the name of a class; that of CLASS_OTHER is no class's own, primed if need be."""
        if index == CLASS_OTHER:
            names, other = self.class_names(), OTHER_CLASS_NAME
            while other in names:
                other += "'"
            return other
        if index >= len(self._class_names):
            self.class_names()
        return self._class_names[index]

    # --- statuses ---

    def _insist(
        self,
        status: int,
        caller: Caller = _NOBODY,
        *,
        invalid: str = "argument",
        reason: Any = None,
    ) -> None:
        if status != lib.ODMA_OK:
            self._fail(status, caller, invalid=invalid, reason=reason)

    def _insist_batch(self, status: int, caller: Caller, batch: Batch) -> None:
        if status == lib.ODMA_OK:
            return
        if status == lib.ODMA_INVALID and self._arena:
            raise batch_error(self._answer.rule, self._answer.rule_index)
        self._fail(status, caller, seq=batch.seq)

    def _fail(
        self,
        status: int,
        caller: Caller,
        *,
        seq: int = 0,
        invalid: str = "argument",
        reason: Any = None,
    ) -> NoReturn:
        """Raise the error that `status` stands for: the only place where it is decided."""
        if not self._arena:
            raise BooksError(f"{self.path}: the arena is closed")
        if status == lib.ODMA_INVALID:
            raise InvalidError(invalid, "breaks a rule of odma.h")
        if status == lib.ODMA_EPOCH:
            raise EpochError(self.name, caller.epoch)
        if status == lib.ODMA_FENCED:
            raise FencedError(self.name, self.report().owner)
        if status == lib.ODMA_UNFENCED:
            raise UnfencedError(self.name, self.report().owner)
        if status == lib.ODMA_LATE:
            raise LateError(caller.number, self.report().number)
        if status == lib.ODMA_SEQ_CHANGED:
            raise SeqChangedError(seq)
        if status == lib.ODMA_SEQ_OLD:
            raise SeqOldError(seq, self.report().seq + 1)
        if status == lib.ODMA_SEQ_GAP:
            raise SeqGapError(seq, self.report().seq + 1)
        raise _file_error(status, self.path, reason)


def optimal_limits(
    weights: Sequence[float] | NDArray[np.float64],
    upper: Sequence[int] | NDArray[np.uint32],
    limit_count: int,
    tolls: NDArray[np.float64] | None = None,
) -> tuple[tuple[int, ...], float]:
    """Return the at most `limit_count` limits that waste the fewest tokens, and the waste.

    Every length in bin i, of weight weights[i], takes the smallest limit that holds
    upper[i]; a limit at bin i that is not the last costs tolls[i] more. Exact; the last
    limit is upper[-1]. Raises InvalidError unless upper ascends, has 1 to 4,096 bins, and
    limit_count is 1 to 16.

    >>> optimal_limits([5.0, 1.0, 1.0], [16, 32, 48], 2)
    ((16, 48), 16.0)
    """
    if len(weights) != len(upper) or (tolls is not None and len(tolls) != len(upper)):
        raise InvalidError("weights", "one for each bin, as tolls")
    weight_array = np.ascontiguousarray(weights, np.float64)
    upper_array = np.ascontiguousarray(upper, np.uint32)
    limits = ffi.new("uint32_t[]", lib.ODMA_LIMITS)
    found, waste = ffi.new("uint32_t *"), ffi.new("double *")
    status = lib.odma_optimal_limits(
        ffi.from_buffer("double[]", weight_array),
        ffi.from_buffer("uint32_t[]", upper_array),
        ffi.NULL if tolls is None else ffi.from_buffer("double[]", np.ascontiguousarray(tolls)),
        len(upper_array),
        limit_count,
        limits,
        found,
        waste,
    )
    if status != lib.ODMA_OK:
        raise InvalidError("upper", "ascending, 1 to 4,096 bins, for 1 to 16 limits")
    return tuple(limits[0 : found[0]]), waste[0]


def _file_error(status: int, path: Path, reason: Any) -> OdmaError:
    sentence = "" if reason is None else sentence_of(reason)
    if status == lib.ODMA_INVALID:
        return broken_rule(reason)
    if status == lib.ODMA_NOT_FOUND:
        return PoolNotFoundError(path.stem)
    if not sentence:
        sentence = ffi.string(lib.odma_status_name(status)).decode()
    if status == lib.ODMA_NO_SPACE:
        return BooksSpaceError(f"{path}: {sentence}")
    return _BOOKS_ERRORS.get(status, BooksError)(f"{path}: {sentence}")


def _text(padded: Any) -> str:
    return str(ffi.string(padded).decode(errors="replace"))


def _values(struct: Any, record: type[ArenaGeometry | Counters | Reuse]) -> list[int]:
    return [getattr(struct, field) for field in record._fields]
