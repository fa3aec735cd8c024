"""Whoever can ever be let in is let in, after a bounded number of rounds.

The twin checks that nothing wrong is done; this checks that the right thing is done at last. An
engine asks each round for all who wait, in one batch or one by one; those who run end. Seeded
random numbers draw tenants, policies, engines and the ways of asking.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest

from odma_service._native import Arena, ArenaGeometry, EngineRecord, PolicyRecord
from odma_service.values import (
    Allocate,
    Batch,
    End,
    Extend,
    Free,
    Moves,
    Overflow,
    Place,
    Reason,
    Start,
    TenantShare,
    Used,
)

UNIT, BLOCKS, REQUESTS, MOST_TOKENS = 4, 48, 20, 24
ROUNDS = 16 * REQUESTS  # for all of them: to be let in, to grow, to come back, and to end


@dataclass
class Request:
    name: str
    tenant: str
    prompt: int
    total: int  # tokens when it ends
    generated: int = 0
    handle: int = 0
    refused: int = 0  # rounds in which it could not grow

    @property
    def held(self):
        return self.prompt + self.generated


class Engine:
    """A pool, and the engine that shares it out. `late`: rounds until a batch is completed."""

    def __init__(self, path, policy, engine, *, blocks=BLOCKS, late=0, max_copies=4096):
        self.arena = Arena.create(
            path, ArenaGeometry(blocks, UNIT, 1024, 1024, max_copies, blocks * UNIT, 0)
        )
        self.arena.set_policy(policy)
        self.arena.open_epoch(1, engine, "boot", b"")
        self.seq, self.late = 0, late
        self.running: list[Request] = []

    def step(self, ops, *, pass_refused=False, copy_tokens=None):
        used = [Used(r.handle, r.held, False) for r in self.running if r.handle]
        completed = max(0, self.seq - self.late)
        self.seq += 1
        batch = Batch(self.seq, completed, used, ops, copy_tokens, pass_refused)
        return self.arena.apply(1, batch, [None] * len(ops)).results

    def alone(self, op):
        return self.arena.unary(1, op, None)


def policy_of(*, start=Start.MAXIMUM, **fields):
    return PolicyRecord("liveness", start, Overflow.COMPACT, **fields)


def ask(request):
    return Allocate(
        request.name,
        request.prompt,
        generated_tokens=request.generated,
        max_total_tokens=request.total,
        tenant=request.tenant,
    )


def some_policy(random):
    tenants, left = [], 1.0
    safety = random.choice((0.0, 0.1, 0.14, 0.3))
    left -= safety
    for name in random.sample(("a", "b"), random.randrange(3)):
        share = random.choice((0.0, 0.1, 0.5, 1.0, 0.86)) * left
        most = random.choice((1.0, max(share, 0.12), max(share, 0.5)))
        tenants.append(TenantShare(name, share, most))
        left -= share
    return PolicyRecord(
        "random",
        start=random.choice(tuple(Start)),
        overflow=random.choice(tuple(Overflow)),
        step_tokens=random.randrange(1, 9),
        safety_share=safety,
        growth=random.choice((1.0, 1.5, 2.0)),
        tenant_share=random.choice((1.0, 0.5, 0.12)),
        max_copy_tokens=random.choice((2**31, 2**31, 12, 0)),
        tenants=tuple(tenants),
    )


def engine_of(moves, *, ordered=False, overlap=False):
    return EngineRecord(moves, ordered, overlap, 2, 1e-6, 1e-7)


def some_engine(random):
    return engine_of(
        random.choice(tuple(Moves)), ordered=random.random() < 0.5, overlap=random.random() < 0.5
    )


def some_request(random, i):
    """Return a request, at times as large as the pool."""
    most = BLOCKS * UNIT if random.random() < 0.1 else 10 * UNIT
    total = random.randrange(2, most + 1)
    prompt = max(1, total - random.randrange(1, MOST_TOKENS))
    return Request(f"{i}", random.choice(("", "a", "b", "c")), prompt, total)


class Life:
    """All the requests of a seed, from their first asking to their end."""

    def __init__(self, seed, path):
        self.random = random = Random(seed)
        self.style = random.choice(("in order", "passing", "one by one", "mixed"))
        copies = random.choice((4096, 2))
        self.engine = Engine(
            path,
            some_policy(random),
            some_engine(random),
            late=random.randrange(3),
            max_copies=copies,
        )
        self.waiting = [some_request(random, i) for i in range(REQUESTS)]
        self.never = 0

    def run(self):
        for rounds in range(ROUNDS):
            if not self.waiting and not self.engine.running:
                return rounds
            self.round()
        names = [(r.name, r.tenant, r.held, r.total) for r in self.waiting]
        raise AssertionError(f"{self.style}: {names} wait, {self.reasons}")

    def round(self):
        style = self.style
        if style == "mixed":
            style = self.random.choice(("in order", "passing", "one by one"))
        if not self.grow():
            return  # what is freed is for them
        waiting = list(self.waiting)
        ops = [ask(request) for request in waiting]
        if style == "one by one":
            self.engine.step([])
            results = [self.engine.alone(op) for op in ops]
        else:
            results = self.engine.step(ops, pass_refused=style == "passing")
        self.reasons = [r.reason for r in results if not isinstance(r, Place)]
        for request, result in zip(waiting, results, strict=True):
            if isinstance(result, Place):
                request.handle, request.refused = result.handle, 0
                self.waiting.remove(request)
                self.engine.running.append(request)
            elif result.reason == Reason.INVALID:
                assert not request.generated, f"{result.field}: it was let in once"
                self.waiting.remove(request)
                self.never += 1

    def grow(self):
        """Let each of those who run have a token, with room for it; the last one ends it.

        Answer whether all got that.
        """
        refused = False
        for request in list(self.engine.running):
            if request not in self.engine.running:
                continue  # has made way
            if request.held >= request.total:
                self.end(request, End.FINISHED)
                continue
            result = self.engine.step([Extend(request.handle, request.held + 1)])[0]
            if isinstance(result, Place):
                request.generated += 1
                request.refused = 0
                continue
            refused = True
            request.refused += 1
            named = [r for r in self.engine.running if r.handle == result.preempt_handle]
            if named:
                self.end(named[0], End.PREEMPTED)
            elif request.refused > 2 * REQUESTS:
                self.end(request, End.PREEMPTED)
        return not refused

    def end(self, request, end):
        assert self.engine.step([Free(request.handle, end, request.generated)])[0]
        self.engine.running.remove(request)
        request.handle = 0
        if end == End.PREEMPTED:
            self.waiting.insert(0, request)


@pytest.mark.parametrize("part", range(4))
def test_whoever_can_ever_be_let_in_is_let_in(tmp_path, part):
    let_in = 0
    for seed in range(part * 60, part * 60 + 60):
        life = Life(seed, tmp_path / f"{seed}.pool")
        try:
            life.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {life.style}: {error}") from error
        let_in += REQUESTS - life.never
        life.engine.arena.close()
    assert let_in > 600, "most of what is asked can be let in"


# --- guarantees while there is no end of others ---


@pytest.mark.parametrize("others", [20, 80, 400])
@pytest.mark.parametrize("in_batches", [False, True])
def test_a_guarantee_holds_however_many_others_poll(tmp_path, others, in_batches):
    """It is let in once all who ran when it first asked have ended: each does after 8 rounds."""
    policy = policy_of(tenants=(TenantShare("chat", 0.5),))
    engine = Engine(tmp_path / "p.pool", policy, engine_of(Moves.NONE))
    polls, sure = 0, Request("sure", "chat", 15 * UNIT, 16 * UNIT)
    ages: dict[int, int] = {}

    def call(op):
        return engine.step([op])[0] if in_batches else engine.alone(op)

    for rounds in range(40):
        if rounds > 10 and isinstance(call(ask(sure)), Place):
            return
        for handle in [handle for handle, age in ages.items() if rounds - age >= 8]:
            del ages[handle]
            call(Free(handle, End.FINISHED, 1))
        for _ in range(others):
            polls += 1
            result = call(ask(Request(f"other {polls}", "other", 3 * UNIT, 4 * UNIT)))
            if isinstance(result, Place):
                ages[result.handle] = rounds
    raise AssertionError("it asked in each of 30 rounds, in vain")


@pytest.mark.parametrize("safety", [0.14, 0.07, 0.3, 0.01])
@pytest.mark.parametrize("blocks", [50, 100, 96, 7])
def test_who_is_sure_of_all_that_is_left_gets_it(tmp_path, safety, blocks):
    shares = (TenantShare("chat", round(1 - safety, 2)),)
    policy = policy_of(safety_share=safety, tenants=shares)
    engine = Engine(tmp_path / "p.pool", policy, engine_of(Moves.NONE), blocks=blocks)
    sure = engine.arena.tenants()[0].guaranteed_tokens
    for i, total in enumerate((UNIT, sure - UNIT)):
        assert isinstance(engine.alone(ask(Request(f"{i}", "chat", total - 1, total))), Place)


# --- small budgets of copies ---


@pytest.mark.parametrize(
    ("copy_tokens", "max_copies"), [(UNIT, 4096), (3 * UNIT, 4096), (2**31, 1), (2**31, 3)]
)
@pytest.mark.parametrize("grows", [False, True])
def test_a_slide_gets_on_in_each_step(tmp_path, copy_tokens, max_copies, grows):
    """24 regions of a block with as many holes: at most as many steps as regions."""
    policy = policy_of()
    engine = Engine(
        tmp_path / "p.pool",
        policy,
        engine_of(Moves.ANY, ordered=True),
        max_copies=max_copies,
    )
    small = [Request(f"{i}", "", UNIT, UNIT) for i in range(BLOCKS)]
    small[0].total = BLOCKS // 2 * UNIT
    if grows:
        engine.arena.set_policy(policy_of(start=Start.STEP, step_tokens=1))
        small[0].prompt = UNIT - 1
    for request in small:
        request.total = request.total if grows or request is not small[0] else UNIT
        request.handle = engine.alone(ask(request)).handle
    for request in small[1::2]:
        engine.alone(Free(request.handle, End.FINISHED, 1))
    engine.running = small[::2]
    op = ask(Request("large", "", BLOCKS // 2 * UNIT - 1, BLOCKS // 2 * UNIT))
    if grows:
        op = Extend(small[0].handle, BLOCKS // 2 * UNIT)
    needed = []
    for _ in range(BLOCKS // 2 + 1):
        result = engine.step([op], copy_tokens=copy_tokens)[0]
        if isinstance(result, Place):
            assert needed
            return
        assert result.reason == Reason.COPY_BUDGET
        needed.append(result.copy_tokens_needed)
        if copy_tokens == 2**31:
            assert result.copy_tokens_needed == 0, "max_copies is what is lacking"
    raise AssertionError(f"it never got there: {needed}")
