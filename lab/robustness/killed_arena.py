"""A process that works on an arena without a pause, killed again and again.

It applies batches, among them operations done alone, reconciliations, and now and then a new
epoch. Before each kill the calls are rehearsed on a copy of the file, in this process: what the
other one must answer is known beforehand, with the same derived indexes, for both have just
attached the same books.
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
from lab.robustness.load import RandomBatches
from lab.robustness.twin import Findings, Held, Outcome, Twin, digest_of
from odma_service._native import Arena, ArenaGeometry, EngineRecord, PolicyRecord, Recovery
from odma_service.errors import OdmaError
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
ENGINES = {
    "one stream": EngineRecord(Moves.ANY, True, True, 56, 1e-7, 1.9e-7),
    "several streams": EngineRecord(Moves.ANY, False, False, 56, 1e-7, 1.9e-7),
}
FILLING = 64  # batches, of many allocates
REHEARSED = 12  # calls for each kill
ALONE_SHARE, RECONCILE_SHARE, EPOCH_SHARE = 0.15, 0.05, 0.002  # of them; the rest are batches
MOST_LEFT_OUT = 3  # by a reconciliation
FULL_SHARE = 0.8
FIRST_SPAN_SECONDS = 0.001
SHORTER, LONGER = 0.8, 1.015
USUAL_OPS = 4
ACKNOWLEDGED = struct.Struct("=QQ")


class Alone(NamedTuple):
    """One operation outside of batches."""

    op: Op


class Reconcile(NamedTuple):
    """All others are freed."""

    handles: tuple[int, ...]


class NewEpoch(NamedTuple):
    """All regions are forgotten."""

    epoch: int


Call = Batch | Alone | Reconcile | NewEpoch


class State(NamedTuple):
    """What an engine knows of its books, and its last batch with the answer, if any."""

    epoch: int
    seq: int = 0
    completed_seq: int = 0
    twin: Twin = Twin()
    last: tuple[Batch, Outcome] | None = None


class Step(NamedTuple):
    """A rehearsed call, a digest of its answer, and what is known then."""

    call: Call
    digest: int
    after: State
    copies: int


class ArenaKills(NamedTuple):
    """What became of some kills. copying: the share of batches that had to move regions."""

    kills: int
    in_batch: int
    acknowledged: int
    copying: float


class Subject:
    """The arena whose process is killed, and what its books must say."""

    def __init__(
        self, program: Path, path: Path, engine: str, seed: int, findings: Findings
    ) -> None:
        self.findings = findings
        self._program = program
        self._path = path
        self._copy = path.with_suffix(".rehearsal")
        self._engine = engine
        self._random = Random(seed)
        self._load = RandomBatches(self._random, BLOCKS * BLOCK_TOKENS)
        self._state = State(1)
        self._span_seconds = FIRST_SPAN_SECONDS  # about what the rehearsed batches take
        self._fill()

    def torture(self, kills: int, watch: Callable[[], None]) -> ArenaKills:
        """Kill so many processes, or as many as it takes to find something wrong."""
        done = in_batch = acknowledged = copying = rehearsed = 0
        while done < kills and not self.findings.words:
            steps = self._rehearse()
            told = self._kill(steps)
            recovery = self._examine(steps, told)
            done += 1
            in_batch += recovery != Recovery.CLEAN
            acknowledged += len(told)
            copying += sum(bool(step.copies) for step in steps)
            rehearsed += len(steps)
            watch()
        return ArenaKills(done, in_batch, acknowledged, copying / max(rehearsed, 1))

    # Before the kill

    def _fill(self) -> None:
        with Arena.create(self._path, GEOMETRY) as arena:
            arena.set_policy(POLICY)
            self._open(arena, self._state.epoch)
            for _ in range(FILLING):
                self._state = self._batch(arena, self._state).after

    def _rehearse(self) -> list[Step]:
        """Do the next calls on a copy of the file."""
        shutil.copyfile(self._path, self._copy)
        self._copy.chmod(0o600)
        with Arena.attach(self._copy) as arena:
            return list(self._play(arena, REHEARSED))

    def _play(self, arena: Arena, count: int) -> Iterator[Step]:
        state = self._state
        for _ in range(count):
            step = self._step(arena, state)
            state = step.after
            yield step

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
        return Step(batch, outcome.digest(), after, len(outcome.copies))

    def _alone(self, arena: Arena, state: State) -> Step:
        op = self._load.alone(state.twin)
        outcome = Outcome((arena.unary(state.epoch, op),), (), ())
        after = state._replace(twin=state.twin.after([op], outcome))
        return Step(Alone(op), outcome.digest(), after, 0)

    def _reconcile(self, arena: Arena, state: State) -> Step:
        held = list(state.twin.held)
        left_out = set(self._random.sample(held, min(len(held), MOST_LEFT_OUT)))
        handles = tuple(handle for handle in held if handle not in left_out)
        kept, freed = arena.reconcile(state.epoch, handles)
        twin = Twin({handle: state.twin.held[handle] for handle in handles})
        after = state._replace(completed_seq=state.seq, twin=twin)
        return Step(Reconcile(handles), _digest_of(kept, freed), after, 0)

    def _new_epoch(self, arena: Arena, state: State) -> Step:
        epoch = state.epoch + 1
        self._open(arena, epoch)
        return Step(NewEpoch(epoch), digest_of([epoch]), State(epoch), 0)

    def _open(self, arena: Arena, epoch: int) -> None:
        arena.open_epoch(epoch, ENGINES[self._engine], "torture", b"")

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

    def _examine(self, steps: list[Step], told: list[tuple[int, int]]) -> Recovery:
        """Attach what is left, and hold it against what was rehearsed and acknowledged."""
        where = f"{self._engine}, {len(told)} calls after seq {self._state.seq}"
        for number, (step, (seq, digest)) in enumerate(zip(steps, told, strict=False)):
            if (step.after.seq, step.digest) != (seq, digest):
                self.findings.note(
                    "wrong_replays", f"{where}: call {number} was answered otherwise"
                )
        try:
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
        report, entries = arena.report(), arena.regions(0, 2 * MOST_REGIONS)
        live = [
            Held(entry.request_id, entry.handle, entry.start_token, entry.length_tokens)
            for entry in entries
            if entry.live
        ]
        if told > 0:
            self._state = steps[told - 1].after
        begun = steps[told] if told < len(steps) else None
        if begun is not None and _is_at(begun.after, report.epoch, report.seq, live):
            self._state = begun.after
        state = self._state
        if (report.epoch, report.seq) != (state.epoch, state.seq):
            self.findings.note("lost", f"{where}: at epoch {report.epoch}, seq {report.seq}")
            return
        self._ask_again(arena, where)
        waiting_tokens = sum(entry.length_tokens for entry in entries if not entry.live)
        held_tokens = BLOCKS * BLOCK_TOKENS - report.free_tokens - waiting_tokens
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
            kept, freed = arena.reconcile(self._state.epoch, call.handles)
            right = not freed and kept == [Place(*twin.held[place.handle][1:]) for place in kept]
        if not right:
            self.findings.note("wrong_replays", f"{where}: {type(call).__name__} again")


def _is_at(state: State, epoch: int, seq: int, live: list[Held]) -> bool:
    held = {region.handle: region for region in live}
    return (state.epoch, state.seq, state.twin.held) == (epoch, seq, held)


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
                yield _line("reconcile", len(step.call.handles), *step.call.handles)
            case NewEpoch():
                yield _line("epoch", step.call.epoch)
            case batch:
                yield from _lines_of(batch)


def _lines_of(batch: Batch) -> Iterator[str]:
    counts = len(batch.used), len(batch.ops)
    yield _line("batch", batch.seq, batch.completed_seq, int(batch.pass_refused), *counts)
    for entry in batch.used:
        yield _line(entry.handle, entry.used_tokens)
    for op in batch.ops:
        yield _line_of(op)


def _line_of(op: Op) -> str:
    match op:
        case Free():
            return _line("free", op.handle, int(op.end), op.output_tokens)
        case Trim():
            return _line("trim", op.handle, op.to_tokens)
        case Extend():
            return _line("extend", op.handle, op.least_tokens)
        case Allocate():
            return _line("allocate", op.request_id, op.prompt_tokens, op.max_total_tokens or 0)


def _line(*words: object) -> str:
    return " ".join(map(str, words))
