"""An engine: continuous batching with prompts in chunks, first come first served.

A step is one batch of the pool, the copies of its answer, and one forward: a token for each
running request, and as many tokens of prompts as `prefill_tokens` allows. The places where other
ways of serving would begin are methods: `_begin` gets a request that has a region, `_write` says
how many of its tokens are in the planes, `_take` adds a token that is final.

The engine belongs to one thread.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Sequence
from itertools import count
from operator import attrgetter
from typing import TYPE_CHECKING

from torch import Tensor

from odma_service.engines.transformers.attention import Piece
from odma_service.engines.transformers.fitness import forward
from odma_service.engines.transformers.memory import Memory
from odma_service.engines.transformers.planes import Planes
from odma_service.engines.transformers.requests import Request, Sampling
from odma_service.errors import InvalidError, RefusedError
from odma_service.values import (
    Allocate,
    Answer,
    End,
    Extend,
    Free,
    Freed,
    Op,
    Place,
    Reason,
    Refusal,
    Used,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_BATCH = 512
MOST_ASKED = 8
"""Requests of the queue in one batch: behind the first that has no room the others are skipped."""
MOST_TEXT_BYTES = 16_384
FULL = {Reason.NO_SPACE, Reason.FRAGMENTED}
PASSING = {Reason.COPY_BUDGET, Reason.WAITS_FOR_COMPLETION, Reason.PINNED, Reason.SKIPPED}
NEVER = {Reason.INVALID, Reason.NOT_FOUND}

Asked = list[tuple[Op, Request]]


class Engine:
    """Serves requests with one model over one pool."""

    def __init__(
        self,
        model: PreTrainedModel,
        planes: Planes,
        pool: Memory,
        *,
        batch_cap: int = 32,
        prefill_tokens: int = 128,
    ) -> None:
        """Raises InvalidError for a bad `batch_cap` or `prefill_tokens`."""
        if not 1 <= batch_cap <= MOST_BATCH:
            raise InvalidError("batch_cap", f"1 to {MOST_BATCH}, not {batch_cap}")
        if prefill_tokens < 1:
            raise InvalidError("prefill_tokens", f"at least 1, not {prefill_tokens}")
        self.counts: Counter[str] = Counter()
        """steps, applies, tokens (computed, again too), copies, preempted and others."""
        self.longest_tokens = planes.longest_tokens
        """The longest total that a request may have."""
        self._model = model
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        self._planes = planes
        self._pool = pool
        self._batch_cap = batch_cap
        self._prefill_tokens = prefill_tokens
        self._numbers = count(1)
        self._queue: list[Request] = []  # in the order of arrival
        self._running: list[Request] = []  # those with a region
        self._unanswered: Asked = []
        self._refused = False  # the head of the queue, and nothing has changed since
        self._told: list[Request] = []  # what this step has to tell

    @property
    def busy(self) -> bool:
        """Whether there is anything to do: a request, or memory to give back."""
        return bool(self._queue or self._running)

    @property
    def waiting(self) -> int:
        """Requests without a region."""
        return len(self._queue)

    def submit(self, request: Request) -> None:
        """Take a request. Raises InvalidError for one that never fits."""
        self.check(request)
        request.number = next(self._numbers)
        self._queue.append(request)

    def check(self, request: Request) -> None:
        """Raise InvalidError for a request that never fits; from any thread."""
        longest = self.longest_tokens
        if len(request.prompt) + request.most_tokens > longest:
            raise InvalidError(
                "most_tokens",
                f"at most {longest:,} tokens together with the prompt's {len(request.prompt):,},"
                f" not {request.most_tokens:,}",
            )
        if not all(0 <= token < self._vocabulary for token in request.prompt):
            raise InvalidError("prompt", f"tokens from 0 to {self._vocabulary - 1:,}")

    def finish(self, request: Request, end: End = End.ABORTED) -> None:
        """End a request before its time; the next step gives its memory back."""
        if not request.over:
            request.end = end

    def step(self) -> list[Request]:
        """Do one step; return the requests that got a token, or that were given up.

        Raises the errors of apply(). After an UnavailableError the next step goes on.
        """
        self._told = []
        self._place()
        packed = self._pack()
        if packed:
            self._compute(packed)
        return self._told

    # --- places ---

    def _place(self) -> None:
        """Ask one batch, if there is anything to ask, and do what its answer says."""
        if self._unanswered:
            answer = self._pool.resume()
        else:
            self._unanswered = self._ask()
            if not self._unanswered:
                return
            answer = self._pool.apply(
                [Used(place.handle, request.computed) for request, place in self._regions()],
                [op for op, _ in self._unanswered],
                completed_seq=self._pool.seq,  # copies are done before anything else is
            )
        asked, self._unanswered = self._unanswered, []
        self._settle(asked, answer)

    def _regions(self) -> list[tuple[Request, Place]]:
        return [(request, request.place) for request in self._running if request.place]

    def _ask(self) -> Asked:
        """Return what to free, to extend and to allocate."""
        asked: Asked = []
        self._queue = [request for request in self._queue if not request.over]
        for request, place in self._regions():
            if request.leaves:
                end = request.end or End.PREEMPTED
                asked.append((Free(place.handle, end, len(request.output)), request))
        freed = bool(asked)
        for request, place in self._regions():
            if not request.leaves and request.computed == place.length_tokens:
                asked.append((Extend(place.handle, request.computed + 1), request))
        if freed or not self._refused:
            room = self._batch_cap - sum(not request.over for request in self._running)
            asked += [
                (self._allocate(request), request)
                for request in self._queue[: max(0, min(room, MOST_ASKED))]
            ]
        return asked

    def _allocate(self, request: Request) -> Allocate:
        text = request.text
        return Allocate(
            f"request-{request.number}",
            len(request.prompt),
            len(request.output),
            max_total_tokens=len(request.prompt) + request.most_tokens,
            text=text and text.encode()[:MOST_TEXT_BYTES].decode(errors="ignore"),
        )

    def _settle(self, asked: Asked, answer: Answer) -> None:
        self._planes.run(answer.copies)
        self.counts.update(
            applies=1,
            copies=len(answer.copies),
            copied_tokens=sum(copy.tokens for copy in answer.copies),
            overlapping_copies=sum(copy.overlaps for copy in answer.copies),
        )
        by_handle = {place.handle: request for request, place in self._regions()}
        for place in answer.moved:
            by_handle[place.handle].place = place
        first: Reason | None = None  # why the first of the queue has no room
        for (op, request), result in zip(asked, answer.results, strict=True):
            if isinstance(result, Place):
                if isinstance(op, Allocate):
                    self._begin(request)
                request.place = result
            elif isinstance(result, Freed):
                self._leave(request)
            else:
                if isinstance(op, Allocate):
                    first = first or result.reason
                self._refuse(op, request, result, by_handle)
        freed = any(isinstance(result, Freed) for result in answer.results)
        if any(isinstance(op, Allocate) for op, _ in asked):
            # What was freed in this batch teaches lengths for the next one.
            self._refused = first is not None and first not in PASSING and not freed

    def _begin(self, request: Request) -> None:
        """Let a request run from its first token: nothing of it is in its region."""
        self._queue.remove(request)
        insort(self._running, request, key=attrgetter("number"))
        request.computed = 0

    def _leave(self, request: Request) -> None:
        """Let a request go whose region was given back; a preempted one comes back."""
        self._running.remove(request)
        request.place = None
        request.preempted = False
        if request.over:
            self.counts["finished"] += 1
        else:
            self.counts.update(preempted=1, lost_tokens=request.computed)
            insort(self._queue, request, key=attrgetter("number"))

    def _refuse(
        self, op: Op, request: Request, refusal: Refusal, by_handle: dict[int, Request]
    ) -> None:
        """Do what a refusal asks: wait, make somebody make way, or give the request up."""
        self.counts["refusals"] += refusal.reason is not Reason.SKIPPED
        alone = len(self._running) == 1 and request.place is not None
        if isinstance(op, Allocate):
            stuck = not self._running and refusal.reason not in PASSING
            if refusal.reason in NEVER or stuck:
                self._give_up(request, refusal)
        elif refusal.reason in NEVER:
            raise RefusedError(refusal)  # the engine and the books disagree
        elif refusal.reason in FULL:
            victim = request if alone else by_handle.get(refusal.preempt_handle)
            if victim is not None and victim.place is not None and not victim.over:
                victim.preempted = True

    def _give_up(self, request: Request, refusal: Refusal) -> None:
        self._queue.remove(request)
        request.error = RefusedError(refusal)
        self._told.append(request)

    # --- tokens ---

    def _pack(self) -> list[tuple[Request, int]]:
        """Return whose tokens are computed in this step, and how many of each."""
        budget = self._prefill_tokens
        packed = []
        for request, place in self._regions():
            if request.leaves:
                continue
            left = request.total - request.computed
            tokens = min(left, place.length_tokens - request.computed)
            if left > 1:
                tokens = min(tokens, budget)
                budget -= tokens
            if tokens > 0:
                packed.append((request, tokens))
        return packed

    def _compute(self, packed: Sequence[tuple[Request, int]]) -> None:
        """Compute the new tokens in one forward, and draw the next ones."""
        row: list[int] = []
        pieces = []
        for request, tokens in packed:
            assert request.place is not None
            total = request.computed + tokens
            pieces.append(Piece(len(row), len(row) + tokens, request.place.start_token, total))
            row += request.tokens(request.computed, total)
        logits = forward(self._model, self._planes.layers, row, pieces)
        likeliest = logits.argmax(-1).tolist()
        self.counts.update(steps=1, tokens=len(row), running=len(packed))
        self.counts["mixed_steps"] += 0 < sum(piece.new > 1 for piece in pieces) < len(pieces)
        for (request, tokens), scores, best in zip(packed, logits, likeliest, strict=True):
            self._write(request, tokens)
            if request.computed == request.total:
                greedy = request.sampling.temperature == 0
                self._take(request, best if greedy else draw(scores, request))

    def _write(self, request: Request, tokens: int) -> None:
        """Note that so many more tokens of a request are in the planes."""
        request.computed += tokens

    def _take(self, request: Request, token: int) -> None:
        """Add a token to an answer. It is final; its key and value come with the next step."""
        request.output.append(token)
        self.counts["generated"] += 1
        if token in request.stop_tokens:
            request.end = End.FINISHED
        elif len(request.output) == request.most_tokens:
            request.end = End.HIT_LIMIT
        self._told.append(request)


def draw(scores: Tensor, request: Request) -> int:
    """Draw a token with a request's own random numbers: others do not change its answer."""
    sampling: Sampling = request.sampling
    shares = (scores.float().cpu() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, tokens = shares.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0
        return int(tokens[ordered.multinomial(1, generator=request.generator)])
    return int(shares.multinomial(1, generator=request.generator))
