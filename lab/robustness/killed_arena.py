"""A process that works on an arena without a pause, killed again and again.

It applies batches, among them operations done alone, reconciliations, and now and then a new
epoch. Before each kill the calls are rehearsed on a copy of the file, in this process: what the
other one must answer is known beforehand, with the same derived indexes, for both have just
attached the same books.

In a pool with granules the beginnings of requests are looked up after a kill, in a copy of the
file. What is found must be what is found without the kill, before the call in doubt or after it.
"""

from __future__ import annotations

import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from lab.bench.building import BenchError
from lab.robustness.load import LONGEST_PROMPT_TOKENS, TALKS, RandomBatches
from lab.robustness.twin import Findings, Held, Outcome, Twin, digest_of
from odma_service._native import (
    Arena,
    ArenaGeometry,
    ArenaReport,
    EngineRecord,
    PolicyRecord,
    Recovery,
    RegionEntry,
)
from odma_service.errors import OdmaError
from odma_service.keys import chained_keys
from odma_service.values import (
    Allocate,
    Answer,
    Batch,
    Extend,
    Free,
    Freed,
    Moves,
    Op,
    Overflow,
    Place,
    Start,
    Trim,
)

BLOCK_TOKENS = 16
BLOCKS = 24_576
MOST_REGIONS = 2_048
MOST_ENTRIES = 3 * MOST_REGIONS  # live, waiting and kept
GEOMETRY = ArenaGeometry(
    blocks=BLOCKS,
    block_tokens=BLOCK_TOKENS,
    max_regions=MOST_REGIONS,
    max_ops=64,
    max_copies=1_024,
    model_length_tokens=2_048,
    digest=0,
)
POLICY = PolicyRecord("torture", Start.STEP, Overflow.COMPACT, step_tokens=64)
ONE_STREAM = EngineRecord(Moves.ANY, True, True, 56, 1e-7, 1.9e-7)
SEVERAL_STREAMS = EngineRecord(Moves.ANY, False, False, 56, 1e-7, 1.9e-7)
GRANULE_TOKENS = 64
ENGINES = {
    "one stream": (ONE_STREAM, 0),
    "several streams": (SEVERAL_STREAMS, 0),
    "one stream, reuse": (ONE_STREAM, GRANULE_TOKENS),
    "several streams, reuse": (SEVERAL_STREAMS, GRANULE_TOKENS),
}
"""What they can do, and the granules of their pools."""
FILLING = 64  # batches, of many allocates
REHEARSED = 12  # calls for each kill
ALONE_SHARE, RECONCILE_SHARE, EPOCH_SHARE = 0.15, 0.05, 0.002  # of them; the rest are batches
MOST_LEFT_OUT = 3  # by a reconciliation
FULL_SHARE = 0.8
LOOKED_UP_TOKENS = LONGEST_PROMPT_TOKENS + GRANULE_TOKENS
FIRST_SPAN_SECONDS = 0.0004
SHORTER, LONGER = 0.8, 1.015
USUAL_OPS = 4
ACKNOWLEDGED = struct.Struct("=QQ")


class Alone(NamedTuple):
    """One operation outside of batches."""

    op: Op


class Reconcile(NamedTuple):
    """All others are freed. completed_seq 0: all that was kept is given up."""

    handles: tuple[int, ...]
    completed_seq: int


class NewEpoch(NamedTuple):
    """All regions are forgotten."""

    epoch: int


Call = Batch | Alone | Reconcile | NewEpoch


class Keyed(NamedTuple):
    """A live region or kept run, and for how much of it keys stand."""

    handle: int
    start_token: int
    shareable_tokens: int


class State(NamedTuple):
    """What an engine knows of its books, and its last batch with the answer, if any.

    keyed: the runs for which keys stand, as the rehearsal found them.
    """

    epoch: int
    seq: int = 0
    completed_seq: int = 0
    twin: Twin = Twin()
    last: tuple[Batch, Outcome] | None = None
    keyed: frozenset[Keyed] = frozenset()


class Step(NamedTuple):
    """A rehearsed call, a digest of its answer, and what is known then."""

    call: Call
    digest: int
    after: State
    copies: int = 0
    reused_tokens: int = 0


class ArenaKills(NamedTuple):
    """What became of some kills. copying: the share of batches that had to move regions.

    reused_tokens is what acknowledged calls have reused, found_tokens the look-ups after kills.
    """

    kills: int
    in_batch: int
    acknowledged: int
    copying: float
    reused_tokens: int
    found_tokens: int


class Subject:
    """The arena whose process is killed, and what its books must say."""

    def __init__(
        self, program: Path, path: Path, engine: str, seed: int, findings: Findings
    ) -> None:
        self.findings = findings
        self._program = program
        self._path = path
        self._copy = path.with_suffix(".rehearsal")
        self._before = path.with_suffix(".before")
        self._engine = engine
        self._record, self._granule_tokens = ENGINES[engine]
        self._found_tokens = 0
        self._random = Random(seed)
        self._load = RandomBatches(
            self._random, BLOCKS * BLOCK_TOKENS, granule_tokens=self._granule_tokens
        )
        self._state = State(1)
        self._span_seconds = FIRST_SPAN_SECONDS  # about what the rehearsed batches take
        self._fill()

    def torture(self, kills: int, watch: Callable[[], None]) -> ArenaKills:
        """Kill so many processes, or as many as it takes to find something wrong."""
        done = in_batch = acknowledged = copying = rehearsed = reused = 0
        while done < kills and not self.findings.words:
            steps = self._rehearse()
            told = self._kill(steps)
            recovery = self._examine(steps, told)
            done += 1
            in_batch += recovery != Recovery.CLEAN
            acknowledged += len(told)
            reused += sum(step.reused_tokens for step in steps[: len(told)])
            copying += sum(bool(step.copies) for step in steps)
            rehearsed += len(steps)
            watch()
        share = copying / max(rehearsed, 1)
        return ArenaKills(done, in_batch, acknowledged, share, reused, self._found_tokens)

    # Before the kill

    def _fill(self) -> None:
        geometry = GEOMETRY._replace(granule_tokens=self._granule_tokens)
        with Arena.create(self._path, geometry) as arena:
            arena.set_policy(POLICY)
            self._open(arena, self._state.epoch)
            for _ in range(FILLING):
                self._state = self._batch(arena, self._state).after
            self._state = self._state._replace(keyed=_keyed(arena.regions(0, MOST_ENTRIES)))

    def _rehearse(self) -> list[Step]:
        """Do the next calls on a copy of the file."""
        _copy(self._path, self._before)
        _copy(self._path, self._copy)
        with Arena.attach(self._copy) as arena:
            return list(self._play(arena, REHEARSED))

    def _play(self, arena: Arena, count: int) -> Iterator[Step]:
        state = self._state
        for _ in range(count):
            step = self._step(arena, state)
            state = step.after._replace(keyed=_keyed(arena.regions(0, MOST_ENTRIES)))
            yield step._replace(after=state)

    def _step(self, arena: Arena, state: State) -> Step:
        chance = self._random.random()
        if chance < EPOCH_SHARE:
            return self._new_epoch(arena, state)
        if chance < EPOCH_SHARE + RECONCILE_SHARE:
            return self._reconcile(arena, state)
        if chance < EPOCH_SHARE + RECONCILE_SHARE + ALONE_SHARE:
            return self._alone(arena, state)
        return self._batch(arena, state)

    def _batch(self, arena: Arena, state: State) -> Step:
        held = sum(region.length_tokens for region in state.twin.held.values())
        full = held > FULL_SHARE * BLOCKS * BLOCK_TOKENS
        self._load.most_ops = USUAL_OPS if full else GEOMETRY.max_ops
        batch = self._load.batch(state.twin, state.seq + 1, state.completed_seq)
        outcome = _outcome(arena.apply(state.epoch, batch))
        after = state._replace(
            seq=batch.seq,
            completed_seq=batch.completed_seq,
            twin=state.twin.after(batch.ops, outcome),
            last=(batch, outcome),
        )
        return Step(batch, outcome.digest(), after, len(outcome.copies), outcome.reused_tokens)

    def _alone(self, arena: Arena, state: State) -> Step:
        op = self._load.alone(state.twin)
        outcome = Outcome((arena.unary(state.epoch, op),), (), ())
        after = state._replace(twin=state.twin.after([op], outcome))
        return Step(Alone(op), outcome.digest(), after, reused_tokens=outcome.reused_tokens)

    def _reconcile(self, arena: Arena, state: State) -> Step:
        held = list(state.twin.held)
        left_out = set(self._random.sample(held, min(len(held), MOST_LEFT_OUT)))
        handles = tuple(handle for handle in held if handle not in left_out)
        completed_seq = state.seq if self._granule_tokens and state.seq % 4 else 0
        kept, freed = arena.reconcile(state.epoch, handles, completed_seq)
        twin = Twin({handle: state.twin.held[handle] for handle in handles})
        after = state._replace(completed_seq=state.seq, twin=twin)
        return Step(Reconcile(handles, completed_seq), _digest_of(kept, freed), after)

    def _new_epoch(self, arena: Arena, state: State) -> Step:
        epoch = state.epoch + 1
        self._open(arena, epoch)
        return Step(NewEpoch(epoch), digest_of([epoch]), State(epoch))

    def _open(self, arena: Arena, epoch: int) -> None:
        arena.open_epoch(epoch, self._record, "torture", b"")

    # The kill

    def _kill(self, steps: list[Step]) -> list[tuple[int, int]]:
        """Let a process do the batches until it is killed; return what it acknowledged."""
        moment = max(int(self._random.uniform(0, self._span_seconds) * 1e9), 1)
        command = [str(self._program), str(self._path), str(moment)]
        asked = "\n".join(_lines(steps)).encode()
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(asked)
            process.stdin.close()
            # Read only then: a reader that wakes up at each answer would get its processor.
            if process.wait() != -signal.SIGKILL:
                raise BenchError("the process to be killed ended by itself")
            told = list(ACKNOWLEDGED.iter_unpack(process.stdout.read()))
        # So that few are done before they are killed, however busy the machine is.
        self._span_seconds *= SHORTER if len(told) == len(steps) else LONGER
        return told

    # After the kill

    def _look_up_again(self, where: str, steps: list[Step], told: int) -> None:
        """Look up the beginnings as if there had been no kill, and in what it has left."""
        _copy(self._path, self._copy)
        found = self._look_up()
        self._found_tokens += sum(found)
        if all(found != self._look_up_after(steps[:done]) for done in (told, told + 1)):
            self.findings.note("lost", f"{where}: beginnings have {found} tokens to reuse")

    def _look_up_after(self, steps: list[Step]) -> list[int]:
        """Do some calls on what there was before the kill, and look up the beginnings."""
        _copy(self._before, self._copy)
        with Arena.attach(self._copy) as arena:
            epoch = self._state.epoch
            for step in steps:
                self._do(arena, epoch, step.call)
                epoch = step.after.epoch
        return self._look_up()

    def _do(self, arena: Arena, epoch: int, call: Call) -> None:
        match call:
            case Alone():
                arena.unary(epoch, call.op)
            case Reconcile():
                arena.reconcile(epoch, *call)
            case NewEpoch():
                self._open(arena, call.epoch)
            case batch:
                arena.apply(epoch, batch)

    def _look_up(self) -> list[int]:
        """Return the tokens that requests with known beginnings would reuse, in the copied file.

        Half of the regions make room for them.
        """
        with Arena.attach(self._copy) as arena:
            report = arena.report()
            live = [entry.handle for entry in arena.regions(0, MOST_ENTRIES) if entry.live]
            arena.reconcile(report.epoch, live[::2], report.seq)
            asked: list[Op] = [_beginning_with(talk) for talk in range(TALKS)]
            batch = Batch(report.seq + 1, report.seq, [], asked, BLOCKS * BLOCK_TOKENS, True)
            results = arena.apply(report.epoch, batch).results
        return [place.reused_tokens if isinstance(place, Place) else 0 for place in results]

    def _examine(self, steps: list[Step], told: list[tuple[int, int]]) -> Recovery:
        """Attach what is left, and hold it against what was rehearsed and acknowledged."""
        where = f"{self._engine}, {len(told)} calls after seq {self._state.seq}"
        for number, (step, (seq, digest)) in enumerate(zip(steps, told, strict=False)):
            if (step.after.seq, step.digest) != (seq, digest):
                self.findings.note(
                    "wrong_replays", f"{where}: call {number} was answered otherwise"
                )
        try:
            if self._granule_tokens:
                self._look_up_again(where, steps, len(told))
            with Arena.attach(self._path) as arena:
                recovery = arena.report().recovery
                self._compare(arena, where, steps, len(told))
                arena.check()
        except OdmaError as error:
            self.findings.note("lost", f"{where}: {error}")
            return Recovery.CLEAN
        return recovery

    def _compare(self, arena: Arena, where: str, steps: list[Step], told: int) -> None:
        """The call that nobody was told of was done wholly, or not at all."""
        report, entries = arena.report(), arena.regions(0, MOST_ENTRIES)
        keyed = _keyed(entries)
        live = [
            Held(entry.request_id, entry.handle, entry.start_token, entry.length_tokens)
            for entry in entries
            if entry.live
        ]
        if told > 0:
            self._state = steps[told - 1].after
        begun = steps[told] if told < len(steps) else None
        if begun is not None and _is_at(begun.after, report, live, keyed):
            self._state = begun.after
        state = self._state
        if (report.epoch, report.seq) != (state.epoch, state.seq):
            self.findings.note("lost", f"{where}: at epoch {report.epoch}, seq {report.seq}")
            return
        if keyed != state.keyed:
            wrong = sorted(keyed ^ state.keyed)
            self.findings.note("lost", f"{where}: keys stand otherwise for {wrong}")
        self._ask_again(arena, where)
        not_held = report.free_tokens + report.awaiting_completion_tokens
        held_tokens = BLOCKS * BLOCK_TOKENS - not_held
        self.findings.compare(where, state.twin, live, held_tokens)
        if begun is not None and state is begun.after:
            self._repeat(arena, where, begun.call)

    def _ask_again(self, arena: Arena, where: str) -> None:
        """The last batch keeps its answer, whatever was done since."""
        if self._state.last is None:
            return
        batch, outcome = self._state.last
        again = arena.apply(self._state.epoch, batch)
        if not again.replayed or _outcome(again) != outcome:
            self.findings.note("wrong_replays", f"{where}: seq {batch.seq} again")

    def _repeat(self, arena: Arena, where: str, call: Call) -> None:
        """What is asked again, because no answer came, finds it done."""
        twin = self._state.twin
        right = True
        if isinstance(call, Alone) and isinstance(call.op, Free):
            right = arena.unary(self._state.epoch, call.op) == Freed(already_free=True)
        elif isinstance(call, Reconcile):
            kept, freed = arena.reconcile(self._state.epoch, *call)
            right = not freed and kept == [Place(*twin.held[place.handle][1:]) for place in kept]
        if not right:
            self.findings.note("wrong_replays", f"{where}: {type(call).__name__} again")


def _copy(path: Path, copy: Path) -> None:
    shutil.copyfile(path, copy)
    copy.chmod(0o600)


def _beginning_with(talk: int) -> Allocate:
    keys = chained_keys([talk] * LOOKED_UP_TOKENS, GRANULE_TOKENS, b"")
    return Allocate(f"look-up-{talk}", LOOKED_UP_TOKENS, keys=keys)


def _keyed(entries: list[RegionEntry]) -> frozenset[Keyed]:
    return frozenset(
        Keyed(entry.handle, entry.start_token, entry.shareable_tokens)
        for entry in entries
        if entry.shareable_tokens
    )


def _is_at(state: State, report: ArenaReport, live: list[Held], keyed: frozenset[Keyed]) -> bool:
    held = {region.handle: region for region in live}
    known = state.epoch, state.seq, state.twin.held, state.keyed
    return known == (report.epoch, report.seq, held, keyed)


def _outcome(answer: Answer) -> Outcome:
    return Outcome(tuple(answer.results), tuple(answer.copies), tuple(answer.moved))


def _digest_of(kept: list[Place], freed: list[int]) -> int:
    return digest_of([word for place in kept for word in place[:3]] + freed)


def _lines(steps: list[Step]) -> Iterator[str]:
    """Yield the calls as torture.c reads them."""
    yield str(len(steps))
    for step in steps:
        match step.call:
            case Alone():
                yield "alone"
                yield _line_of(step.call.op)
            case Reconcile():
                handles, completed_seq = step.call
                yield _line("reconcile", completed_seq, len(handles), *handles)
            case NewEpoch():
                yield _line("epoch", step.call.epoch)
            case batch:
                yield from _lines_of(batch)


def _lines_of(batch: Batch) -> Iterator[str]:
    counts = len(batch.used), len(batch.ops)
    yield _line("batch", batch.seq, batch.completed_seq, int(batch.pass_refused), *counts)
    for entry in batch.used:
        yield _line(entry.handle, entry.used_tokens, entry.shareable_tokens)
    for op in batch.ops:
        yield _line_of(op)


def _line_of(op: Op) -> str:
    match op:
        case Free():
            kept = op.keep_tokens, *_keys(op.keys)
            return _line("free", op.handle, int(op.end), op.output_tokens, *kept)
        case Trim():
            return _line("trim", op.handle, op.to_tokens)
        case Extend():
            return _line("extend", op.handle, op.least_tokens)
        case Allocate():
            tokens = op.prompt_tokens, op.max_total_tokens or 0
            return _line("allocate", op.request_id, *tokens, *_keys(op.keys))


def _keys(keys: bytes) -> tuple[int, str]:
    return len(keys), f":{keys.hex()}"


def _line(*words: object) -> str:
    return " ".join(map(str, words))
