"""A process that applies batches back to back on an arena, killed again and again.

Before each kill the batches are rehearsed on a copy of the file, in this process: what the
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

from odma_service._native import Arena, ArenaGeometry, EngineRecord, PolicyRecord, Recovery
from odma_service.bench.building import BenchError
from odma_service.bench.load import Load
from odma_service.bench.model import Findings, Held, Model, Outcome
from odma_service.errors import OdmaError
from odma_service.values import (
    Allocate,
    Answer,
    Batch,
    Extend,
    Free,
    Moves,
    Op,
    Overflow,
    Start,
    Trim,
)

EPOCH = 1
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
REHEARSED = 12  # batches for each kill
FIRST_SPAN_SECONDS = 0.001
SHORTER, LONGER = 0.8, 1.015
USUAL_OPS = 4
ACKNOWLEDGED = struct.Struct("=QQ")


class Step(NamedTuple):
    """A rehearsed batch: how it is answered, and what is held then."""

    batch: Batch
    outcome: Outcome
    digest: int
    model: Model


class Tally(NamedTuple):
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
        self._load = Load(self._random, BLOCKS * BLOCK_TOKENS)
        self._model = Model()
        self._seq = 0
        self._span_seconds = FIRST_SPAN_SECONDS  # about what the rehearsed batches take
        self._fill()

    def torture(self, kills: int, watch: Callable[[], None]) -> Tally:
        """Kill so many processes, or as many as it takes to find something wrong."""
        done = in_batch = acknowledged = copying = rehearsed = 0
        while done < kills and not self.findings.words:
            steps = self._rehearse()
            told = self._kill(steps)
            recovery = self._examine(steps, told)
            done += 1
            in_batch += recovery != Recovery.CLEAN
            acknowledged += len(told)
            copying += sum(bool(step.outcome.copies) for step in steps)
            rehearsed += len(steps)
            watch()
        return Tally(done, in_batch, acknowledged, copying / max(rehearsed, 1))

    # Before the kill

    def _fill(self) -> None:
        self._load.most_ops = GEOMETRY.max_ops
        with Arena.create(self._path, GEOMETRY) as arena:
            arena.set_policy(POLICY)
            arena.open_epoch(EPOCH, ENGINES[self._engine], "torture", b"")
            for step in self._play(arena, FILLING):
                self._model, self._seq = step.model, step.batch.seq
        self._load.most_ops = USUAL_OPS

    def _rehearse(self) -> list[Step]:
        """Do the next batches on a copy of the file."""
        shutil.copyfile(self._path, self._copy)
        self._copy.chmod(0o600)
        with Arena.attach(self._copy) as arena:
            return list(self._play(arena, REHEARSED))

    def _play(self, arena: Arena, count: int) -> Iterator[Step]:
        model = self._model
        for seq in range(self._seq + 1, self._seq + 1 + count):
            batch = self._load.batch(model, seq)
            outcome = _outcome(arena.apply(EPOCH, batch))
            model = model.after(batch, outcome)
            yield Step(batch, outcome, outcome.digest(), model)

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
        last = self._seq + len(told)
        where = f"{self._engine}, after seq {last}"
        for step, (seq, digest) in zip(steps, told, strict=False):
            if (step.batch.seq, step.digest) != (seq, digest):
                self.findings.note("wrong_replays", f"{where}: seq {seq} was answered otherwise")
        try:
            with Arena.attach(self._path) as arena:
                report = arena.report()
                if report.seq not in (last, last + 1):
                    self.findings.note("lost", f"{where}: the books are at seq {report.seq}")
                    return report.recovery
                self._compare(arena, where, steps[: report.seq - self._seq])
                self._seq = report.seq
                arena.check()
        except OdmaError as error:
            self.findings.note("lost", f"{where}: {error}")
            return Recovery.CLEAN
        return report.recovery

    def _compare(self, arena: Arena, where: str, done: list[Step]) -> None:
        if done:
            step = done[-1]
            self._model = step.model
            again = arena.apply(EPOCH, step.batch)
            if not again.replayed or _outcome(again) != step.outcome:
                self.findings.note("wrong_replays", f"{where}: seq {step.batch.seq} again")
        report, entries = arena.report(), arena.regions(0, 2 * MOST_REGIONS)
        waiting_tokens = sum(entry.length_tokens for entry in entries if not entry.live)
        held_tokens = BLOCKS * BLOCK_TOKENS - report.free_tokens - waiting_tokens
        live = [
            Held(entry.request_id, entry.handle, entry.start_token, entry.length_tokens)
            for entry in entries
            if entry.live
        ]
        self.findings.compare(where, self._model, live, held_tokens)


def _outcome(answer: Answer) -> Outcome:
    return Outcome(tuple(answer.results), tuple(answer.copies), tuple(answer.moved))


def _lines(steps: list[Step]) -> Iterator[str]:
    """Yield the batches as bench/torture.c reads them."""
    yield str(len(steps))
    for step in steps:
        batch = step.batch
        counts = len(batch.used), len(batch.ops)
        yield _line(batch.seq, batch.completed_seq, int(batch.pass_refused), *counts)
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
