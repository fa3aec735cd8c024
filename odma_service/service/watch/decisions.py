"""Decision log: one JSON line for each request, written when it ends.

docs/reference/decision-log.md has its fields.

A call only notes what it decided; a thread of the log's own makes records of the notes and
writes them. Notes have a bound: beyond it, decisions are dropped and counted, and no call ever
waits. Texts of prompts and keys are not even noted.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, NamedTuple, Protocol

import structlog

from odma_service.errors import OdmaError
from odma_service.pool import Pool
from odma_service.values import (
    Allocate,
    Copy,
    Extend,
    Free,
    Freed,
    Op,
    Place,
    Quantiles,
    Refusal,
    Result,
    Text,
)
from odma_service.values import End as EndOfRequest

VERSION = 1
MOST_QUEUED = 100_000
"""Operations noted and not yet read."""
MOST_WAITING = 4_096
"""Requests of a pool that are remembered while they have no region."""
PAUSE_SECONDS = 0.1
ROTATED = 7
"""Full files kept beside the one that is written: NAME.1 is the newest."""
LONGEST_LINE_BYTES = 1 << 20
TAIL_BYTES = 2 * LONGEST_LINE_BYTES
REQUEST_START = '{"odma":"request",'

log = structlog.get_logger()


@dataclass(slots=True)
class Life:
    """A request from its first Allocate to its end. Times are Unix seconds."""

    request_id: str
    request_class: str = ""
    tenant: str | None = None
    asked: float | None = None
    granted: float | None = None
    prompt_tokens: int = 0
    generated_before_tokens: int = 0
    max_total_tokens: int | None = None
    guess_tokens: int | None = None
    overflow_risk: float | None = None
    with_text: bool | None = None
    sketch: str | None = None
    quantiles_tokens: Quantiles | None = None
    granted_tokens: int = 0
    last_tokens: int = 0
    extends: int = 0
    copied_tokens: int = 0
    reused_tokens: int = 0
    preemptions: int = 0
    refusals: Counter[str] = field(default_factory=Counter)


class Noted(NamedTuple):
    """The decisions of one call. ended: the handles that a Reconcile freed."""

    pool: str
    epoch: int
    unix_seconds: float
    ops: Sequence[Op]
    predictions: Sequence[Quantiles | None] | None
    results: Sequence[Result]
    copies: Sequence[Copy]
    ended: Sequence[int] = ()
    living: Iterable[tuple[int, Life]] = ()
    sketches: Sequence[str | None] | None = None


class Sketcher(Protocol):
    """A Predictor, as far as it is used here."""

    def sketch(self, text: Text, prompt_tokens: int) -> str | None:
        """Return the sketch of a prompt, as one word, None for none. Does not raise."""


class DecisionLog:
    """The log of one service. Raises OdmaError if its file cannot be written.

    `sketcher` gives the model that sketches prompts, None for no sketch.
    """

    def __init__(
        self,
        path: Path,
        most_bytes: int,
        wall: Callable[[], float] = time.time,
        sketcher: Callable[[], Sketcher | None] = lambda: None,
    ) -> None:
        self._wall = wall
        self._sketcher = sketcher
        self._file = RotatedFile(path, most_bytes)
        self._lock = Lock()
        self._noted: deque[Noted] = deque()
        self._queued = 0
        self.dropped = 0
        """Calls whose decisions were not noted, for lack of room."""
        self.written = 0
        """Records."""
        self.failed = 0
        """Records that the file did not take."""
        self._failing = False
        self._pools: dict[str, PoolLives] = {}
        self._stop = Event()
        self._thread = Thread(target=self._run, name="decision-log", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what was noted. Requests that still run are not written."""
        self._stop.set()
        self._thread.join()
        self._file.close()

    # --- called by the threads that decide ---

    def adopt(self, pool: Pool) -> None:
        """Begin to follow an epoch of a pool, with the regions that it has."""
        living = [
            (
                entry.handle,
                Life(
                    request_id=entry.request_id,
                    request_class=entry.request_class,
                    prompt_tokens=entry.prompt_tokens,
                    generated_before_tokens=entry.generated_tokens,
                    max_total_tokens=entry.max_total_tokens,
                    last_tokens=entry.length_tokens,
                ),
            )
            for entry in pool.regions(room=pool.most_entries)
            if entry.live
        ]
        self._put(pool, living=living)

    def decided(
        self,
        pool: Pool,
        ops: Sequence[Op],
        predictions: Sequence[Quantiles | None] | None,
        results: Sequence[Result],
        copies: Sequence[Copy],
    ) -> None:
        """Note what a call decided."""
        if ops:
            model = self._sketcher()
            granted = zip(ops, results, strict=True)
            sketches = [_sketch(model, op, result) for op, result in granted] if model else None
            ops = list(map(_without_prompt, ops))
            self._put(pool, ops, predictions, results, copies, sketches=sketches)

    def reconciled(self, pool: Pool, freed: Sequence[int]) -> None:
        """Note the handles that a Reconcile freed."""
        self._put(pool, ended=freed)

    def epoch_over(self, pool: str) -> None:
        """Note that the pool's regions and requests are void."""
        with self._lock:
            self._noted.append(Noted(pool, 0, self._wall(), (), None, (), ()))

    def _put(
        self,
        pool: Pool,
        ops: Sequence[Op] = (),
        predictions: Sequence[Quantiles | None] | None = None,
        results: Sequence[Result] = (),
        copies: Sequence[Copy] = (),
        *,
        ended: Sequence[int] = (),
        living: Sequence[tuple[int, Life]] = (),
        sketches: Sequence[str | None] | None = None,
    ) -> None:
        size = len(ops) + len(ended) + len(living)
        noted = Noted(
            pool.spec.name,
            pool.epoch,
            self._wall(),
            ops,
            predictions,
            results,
            copies,
            ended,
            living,
            sketches,
        )
        with self._lock:
            if self._queued + size > MOST_QUEUED:
                self.dropped += 1
                return
            self._queued += size
            self._noted.append(noted)

    # --- the log's own thread ---

    def _run(self) -> None:
        over = False
        while not over:
            over = self._stop.wait(PAUSE_SECONDS)
            try:
                self._write()
            except Exception:
                log.exception("the decision log failed; it goes on")

    def _write(self) -> None:
        lines: list[str] = []
        with self._lock:
            noted, self._noted, self._queued = self._noted, deque(), 0
        for note in noted:
            lives = self._pools.setdefault(note.pool, PoolLives(note.pool))
            lines += lives.read(note)
            if not note.epoch:
                del self._pools[note.pool]
        if not lines:
            return
        try:
            self._file.write(lines)
        except OSError as error:
            self.failed += len(lines)
            if not self._failing:  # one line, until it is over
                log.error("decisions not written", records=len(lines), reason=error.strerror)
            self._failing = True
        else:
            self.written += len(lines)
            if self._failing:
                log.info("decisions are written again", failed=self.failed)
            self._failing = False


class PoolLives:
    """The requests of one pool: those with a region by handle, those without by id."""

    def __init__(self, pool: str) -> None:
        self._pool = pool
        self._epoch = 0
        self._living: dict[int, Life] = {}
        self._waiting: OrderedDict[str, Life] = OrderedDict()

    def read(self, noted: Noted) -> list[str]:
        """Follow the decisions of a call; return the records of the requests that are over."""
        records: list[str] = []

        def end(life: Life, how: str, output_tokens: int | None = None) -> None:
            records.append(self._record(life, noted.unix_seconds, how, output_tokens))

        if noted.epoch != self._epoch:
            for life in self._living.values():
                end(life, "EPOCH_OVER")
            for life in self._waiting.values():
                end(life, "NOT_GRANTED")
            self._living.clear()
            self._waiting.clear()
            self._epoch = noted.epoch
        for handle, life in noted.living:
            self._living.setdefault(handle, life)
        for i, (op, result) in enumerate(zip(noted.ops, noted.results, strict=True)):
            if isinstance(op, Allocate):
                prediction = noted.predictions[i] if noted.predictions else None
                sketch = noted.sketches[i] if noted.sketches else None
                self._asked(op, prediction, sketch, result, noted.unix_seconds)
            elif isinstance(op, Extend):
                self._extended(op, result)
            elif isinstance(op, Free) and isinstance(result, Freed):
                if op.handle not in self._living:
                    continue
                life = self._living.pop(op.handle)
                if op.end == EndOfRequest.PREEMPTED:
                    life.preemptions += 1
                    self._waiting[life.request_id] = life
                else:
                    end(life, EndOfRequest(op.end).name, op.output_tokens)
        for copy in noted.copies:
            if copy.handle in self._living:
                self._living[copy.handle].copied_tokens += copy.tokens
        for handle in noted.ended:
            if handle in self._living:
                end(self._living.pop(handle), "RECONCILED")
        while len(self._waiting) > MOST_WAITING:
            end(self._waiting.popitem(last=False)[1], "NOT_GRANTED")
        return records

    def _asked(
        self,
        op: Allocate,
        prediction: Quantiles | None,
        sketch: str | None,
        result: Result,
        unix_seconds: float,
    ) -> None:
        if isinstance(result, Place) and result.handle in self._living:
            return  # asked again for what it has
        life = self._waiting.pop(op.request_id, None)
        if life is None:
            life = Life(
                op.request_id,
                asked=unix_seconds,
                prompt_tokens=op.prompt_tokens,
                generated_before_tokens=op.generated_tokens,
            )
        life.request_class, life.tenant = op.request_class, op.tenant
        life.max_total_tokens = op.max_total_tokens
        life.guess_tokens, life.overflow_risk = op.predicted_output_tokens, op.overflow_risk
        life.with_text = op.text is not None
        life.sketch = sketch or life.sketch
        if prediction is not None:
            life.quantiles_tokens = prediction
        if isinstance(result, Place):
            if life.granted is None:
                life.granted, life.granted_tokens = unix_seconds, result.length_tokens
            life.last_tokens = result.length_tokens
            life.reused_tokens += result.reused_tokens
            self._living[result.handle] = life
        elif isinstance(result, Refusal):
            life.refusals[result.reason.name] += 1
            self._waiting[op.request_id] = life

    def _extended(self, op: Extend, result: Result) -> None:
        life = self._living.get(op.handle)
        if life is None:
            return
        if isinstance(result, Place):
            life.extends += 1
            life.last_tokens = result.length_tokens or life.last_tokens
        elif isinstance(result, Refusal):
            life.refusals[f"EXTEND_{result.reason.name}"] += 1

    def _record(self, life: Life, ended: float, end: str, output_tokens: int | None) -> str:
        record: dict[str, Any] = {
            "version": VERSION,
            "pool": self._pool,
            "epoch": self._epoch,
            **{name: getattr(life, name) for name in Life.__slots__},
            "ended": ended,
            "end": end,
            "output_tokens": output_tokens,
        }
        for name in ("asked", "granted", "ended"):
            record[name] = record[name] and round(record[name], 6)
        if life.quantiles_tokens is not None:
            record["quantiles_tokens"] = [round(q, 1) for q in life.quantiles_tokens]
        return REQUEST_START + json.dumps(record, separators=(",", ":"))[1:] + "\n"


def _sketch(model: Sketcher, op: Op, result: Result) -> str | None:
    """Return the sketch of a prompt that was given a place: a refused one is asked for again."""
    if isinstance(op, Allocate) and isinstance(op.text, Text) and isinstance(result, Place):
        return model.sketch(op.text, op.prompt_tokens)
    return None


def _without_prompt(op: Op) -> Op:
    """Return an operation as it is noted: without keys, of a text only that there was one."""
    if isinstance(op, Allocate) and (op.keys or op.text is not None):
        return op._replace(text=None if op.text is None else "", keys=b"")
    if isinstance(op, Free) and op.keys:
        return op._replace(keys=b"")
    return op


class RotatedFile:
    """Lines in a file of at most so many bytes, and in ROTATED older ones. For one process."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        self._path = path
        self._most_bytes = most_bytes
        try:
            self._descriptor, self._size = _open(path)
        except OSError as error:
            locked = isinstance(error, BlockingIOError)
            reason = "another server writes it" if locked else error.strerror
            raise OdmaError(f"cannot write the decision log {path}: {reason}") from None

    def close(self) -> None:
        """Give the file up."""
        os.close(self._descriptor)

    def write(self, lines: list[str]) -> None:
        """Append lines, all or none. Raises OSError."""
        data = "".join(lines).encode()
        if self._size and self._size + len(data) > self._most_bytes:
            self._rotate()
        try:
            left = data
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(data)

    def _rotate(self) -> None:
        """Begin a new file. It is opened first; an attempt that fails loses no older one.

        Names move up as far as the first that is free: where an attempt has stopped, the next
        one goes on.
        """
        new = Path(f"{self._path}.new")
        new.unlink(missing_ok=True)
        descriptor, size = _open(new)
        names = [self._path, *(Path(f"{self._path}.{i + 1}") for i in range(ROTATED))]
        try:
            free = next((i for i, name in enumerate(names) if not name.exists()), ROTATED)
            for newer, older in reversed(list(pairwise(names[: free + 1]))):
                newer.replace(older)
            new.replace(self._path)
        except OSError:
            os.close(descriptor)
            raise
        full, self._descriptor, self._size = self._descriptor, descriptor, size
        os.close(full)


def _open(path: Path) -> tuple[int, int]:
    """Open a file for one process to append to; return its descriptor and size.

    It is this user's alone then. A crash of the machine may have torn its last line. Raises
    OSError, also for a file that is something else; BlockingIOError if another process has it.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        whole = _whole_bytes(descriptor)
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, whole)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor, whole


def _whole_bytes(descriptor: int) -> int:
    """Return where the last whole line of a log ends. Raises OSError if it is none."""
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, TAIL_BYTES, max(size - TAIL_BYTES, 0))
    end = tail.rfind(b"\n") + 1
    last = tail[tail.rfind(b"\n", 0, max(end - 1, 0)) + 1 : end] or tail
    start = REQUEST_START.encode()
    if last[: len(start)] != start[: len(last)]:
        raise OSError(errno.EEXIST, "it is there, and no decision log")
    return size - (len(tail) - end)
