"""A drifting stream: kinds of prompts one after the other, and answers that come in late.

Every request goes through a real pool, whose policy reserves the quantile at the target and
nothing more, and through the Learner that serves: history, model, correction and gate are what
an engine would get. A region that is outgrown is extended, as an engine would; what counts is
what was reserved for the request at first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from odma_service.errors import PoolLimitError
from odma_service.learning import Learner, Model, Source, predictions_of
from odma_service.pool import Pool, PoolSpec
from odma_service.pool.geometry import Geometry
from odma_service.pool.policy import named
from odma_service.values import (
    Allocate,
    Batch,
    End,
    Extend,
    Free,
    Moves,
    Op,
    Place,
    PlaneGroup,
    Predicted,
    Refusal,
    Used,
)

RECOVERED = 0.93
AHEAD = 100
CAPACITY_TOKENS = 2**24
LEAST_TOKENS = 2**15
EPOCH = 1


class Kind(NamedTuple):
    """Requests of one kind, in order. Text None: not told."""

    name: str
    texts: Sequence[str | None]
    prompt_tokens: Sequence[int]
    output_tokens: Sequence[int]


class Served(NamedTuple):
    """Requests in order: their phase, real and reserved output tokens, what that rested on."""

    phases: NDArray[np.int64]
    actual: NDArray[np.int64]
    reserved: NDArray[np.int64]
    sources: NDArray[np.object_]

    @property
    def covered(self) -> NDArray[np.bool_]:
        """Whether each request stayed within what was reserved."""
        return self.actual <= self.reserved


class Phase(NamedTuple):
    """What one phase shows.

    recovery_requests: after how many requests the AHEAD next ones are covered to RECOVERED;
    None: never. window_share: how often lengths alone were used. Of no requests all is NaN.
    """

    name: str
    requests: int
    coverage: float
    reserved_over_actual: float
    first_coverage: float
    recovery_requests: int | None
    window_share: float


def serve_stream(
    kinds: Sequence[Kind],
    delay: float,
    model: Model | None,
    directory: Path,
    *,
    target: float = 0.95,
    most_output_tokens: int = 32_768,
    watch: Callable[[int], None] | None = None,
) -> Served:
    """Serve the kinds one after the other. `delay`: requests until the mean answer is there.

    An answer takes proportionally to its length: long ones report late. 0: each is there
    before the next request. No request may reserve more than `most_output_tokens`.
    """
    texts = [text for kind in kinds for text in kind.texts]
    prompts = [tokens for kind in kinds for tokens in kind.prompt_tokens]
    actual = np.array([tokens for kind in kinds for tokens in kind.output_tokens], np.int64)
    actual = np.minimum(actual, most_output_tokens)
    spec = PoolSpec(
        name="stream",
        open_id="stream",
        geometry=Geometry((PlaneGroup(1, 1),)),
        capacity_tokens=CAPACITY_TOKENS,
        model_length_tokens=max(prompts) + most_output_tokens,
        moves=Moves.ANY,
        single_ordered_stream=True,
        copies_may_overlap=True,
        block_tokens=1,
        max_regions=2**15,
    )
    policy = named("odma", spec.model_length_tokens, spec.capacity_tokens).with_changes(
        clear_limits=True, step_tokens=1, overflow_risk=1 - target, safety_share=0.0, growth=1.0
    )
    path = directory / "stream.arena"
    pool = Pool.create(path, spec, EPOCH, "stream", policy)
    try:
        engine = _Engine(Learner(pool, model=lambda: model))
        speed = actual.mean() / delay if delay else np.inf
        for number, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
            engine.report(number)
            maximum = prompt + most_output_tokens
            engine.begin(number, text, prompt, int(actual[number]), maximum, speed)
            if watch is not None:
                watch(number)
    finally:
        pool.close()
        path.unlink()
    phases = np.repeat(np.arange(len(kinds)), [len(kind.texts) for kind in kinds])
    return Served(phases, actual, np.array(engine.reserved), np.array(engine.sources, object))


def phase_of(served: Served, phase: int, name: str, warmup: int = 0) -> Phase:
    """Return what a phase shows, without the first `warmup` requests of the whole stream."""
    chosen = np.flatnonzero(served.phases == phase)
    chosen = chosen[chosen >= warmup]
    if not len(chosen):
        return Phase(name, 0, np.nan, np.nan, np.nan, None, np.nan)
    covered = served.covered[chosen]
    ahead: Any = (
        np.convolve(covered, np.ones(AHEAD), "valid") / AHEAD if len(covered) >= AHEAD else []
    )
    recovered = np.flatnonzero(np.asarray(ahead) >= RECOVERED - 1e-9)
    return Phase(
        name,
        len(chosen),
        float(covered.mean()),
        float(served.reserved[chosen].sum() / served.actual[chosen].sum()),
        float(covered[:AHEAD].mean()),
        int(recovered[0]) if len(recovered) else None,
        float((served.sources[chosen] == Source.WINDOW).mean()),
    )


class _Run(NamedTuple):
    """A request that runs: what it needs, and since when, on the clock of requests."""

    handle: int
    began: int
    prompt_tokens: int
    output_tokens: int
    maximum_tokens: int


class _Engine:
    """The engine's side: what runs, and the batches it sends."""

    def __init__(self, learner: Learner) -> None:
        self.reserved: list[int] = []
        self.sources: list[Source] = []
        self._learner = learner
        self._due: list[tuple[float, int]] = []
        self._running: dict[int, _Run] = {}
        self._length: dict[int, int] = {}  # reserved by now
        self._speed = np.inf

    def report(self, now: int) -> None:
        """Tell the pool what has ended, how far the others are, and grow those that are full."""
        ops: list[Op] = []
        while self._due and self._due[0][0] <= now:
            run = self._running.pop(heappop(self._due)[1])
            ops.append(Free(run.handle, End.FINISHED, run.output_tokens))
            del self._length[run.handle]
        used = []
        for run in self._running.values():
            told = run.prompt_tokens + min(run.output_tokens, int((now - run.began) * self._speed))
            length = self._length[run.handle]
            used.append(Used(run.handle, min(told, length)))
            if told > length:
                want = min(max(2 * length, told), run.maximum_tokens)
                ops.append(Extend(run.handle, told, want))
        self._apply(used, ops)

    def begin(
        self, number: int, text: str | None, prompt: int, output: int, maximum: int, speed: float
    ) -> None:
        """Ask for a region; the answer will be there when `output` tokens are written."""
        op = Allocate(str(number), prompt, max_total_tokens=maximum, text=text)
        answers = self._learner.question([op]).answers()
        place = self._apply([], [op], predictions_of(answers))
        self.reserved.append(place.length_tokens - prompt)
        self.sources.append(answers[0].source if answers[0] else Source.NOTHING)
        self._speed = speed
        self._running[number] = _Run(place.handle, number, prompt, output, maximum)
        heappush(self._due, (number + output / speed, number))

    def _apply(
        self, used: list[Used], ops: list[Op], predictions: Sequence[Predicted | None] = ()
    ) -> Place:
        """Send a batch, and note how long its regions are now; return the last of them."""
        seq = self._learner.pool.last_seq + 1
        known = predictions or [None] * len(ops)
        answer = self._learner.apply(EPOCH, Batch(seq, seq - 1, used, ops), known)
        place = Place(0, 0, 0)
        for result in answer.results:
            if isinstance(result, Refusal):
                why = result.field or result.reason.name
                raise PoolLimitError(f"the stream does not fit into its pool: {why}")
            if isinstance(result, Place):
                place = result
                self._length[place.handle] = place.length_tokens
        return place
