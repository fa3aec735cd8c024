"""Every operation has a bound of steps, at the largest table: steps are counted, not timed."""

from __future__ import annotations

from itertools import count

import pytest

from odma_service._native import Arena, ArenaGeometry, EngineRecord, PolicyRecord
from odma_service._native._odma import ffi, lib
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
    Refusal,
    Start,
    TenantShare,
    Used,
)

UNIT, MOST_OPS = 16, 4096
PLAN_STEPS = 1 << 24
SEARCHES = 8
"""So often at most an operation looks at each run."""

ORDERED, ANY_ORDER = True, False


class Pool:
    """An arena of one-block regions."""

    def __init__(self, path, blocks, *, ordered, regions, tenants=(), moves=Moves.ANY, granule=0):
        self.arena = Arena.create(
            path, ArenaGeometry(blocks, UNIT, regions, MOST_OPS, 4096, blocks * UNIT, 0, granule)
        )
        self.arena.set_policy(
            PolicyRecord("bounds", Start.STEP, Overflow.COMPACT, 1, tenants=tenants)
        )
        self.arena.open_epoch(1, EngineRecord(moves, ordered, True, 2, 1e-6, 1e-7), "boot", b"")
        self.seq, self.names, self.runs = 0, count(), 2 * 2 * regions + 2

    def step(self, ops, used=(), *, completes=True, pass_refused=True):
        self.seq += 1
        completed = self.seq - 1 if completes else self.completed
        self.completed = completed
        batch = Batch(self.seq, completed, list(used), ops, None, pass_refused)
        return self.arena.apply(1, batch, [None] * len(ops)).results

    def allocate(self, blocks, tenant="", most=None):
        total = blocks * UNIT
        most = most or blocks
        return Allocate(
            f"{next(self.names)}", total - 1, max_total_tokens=most * UNIT, tenant=tenant
        )

    def fill(self, number, **fields):
        """Place `number` regions of a block; return their handles, in address order."""
        handles = []
        while len(handles) < number:
            part = min(MOST_OPS, number - len(handles))
            ops = [self.allocate(1, **fields) for _ in range(part)]
            handles += [place.handle for place in self.step(ops)]
        return handles

    def free(self, handles, *, completes=True):
        for at in range(0, len(handles), MOST_OPS):
            ops = [Free(handle, End.ABORTED, 0) for handle in handles[at : at + MOST_OPS]]
            self.step(ops, completes=completes)

    def steps(self):
        steps = ffi.new("uint64_t *")
        assert lib.odma_arena_plan_steps(self.arena._arena, steps) == lib.ODMA_OK
        return steps[0]


def pool_of_waiting(path, waiting):
    """Return a pool with `waiting` runs of a block between pinned regions, and a longer hole."""
    hole = waiting + 8
    pool = Pool(path, hole + waiting + 2 + 64, ordered=ANY_ORDER, regions=waiting + 4)
    large = pool.step([pool.allocate(hole)])[0].handle
    handles = pool.fill(waiting + 2)
    pool.free([large])
    pool.step([])
    pool.free(handles[1:-1], completes=False)
    used = [Used(handle, UNIT, True) for handle in (handles[0], handles[-1])]
    return pool, used, hole + 1


def test_one_search_among_waiting_runs_looks_at_each_a_few_times(tmp_path):
    pool, used, length = pool_of_waiting(tmp_path / "p.pool", 16_000)
    result = pool.step([pool.allocate(length)], used, completes=False)[0]
    assert result.reason == Reason.FRAGMENTED
    assert 16_000 < pool.steps() <= SEARCHES * pool.runs


@pytest.mark.parametrize("ordered", [ORDERED, ANY_ORDER])
@pytest.mark.parametrize("tenants", [(), (TenantShare("sure", 0.9),)])
def test_no_batch_searches_on_beyond_its_budget(tmp_path, ordered, tenants):
    """The largest table, full of holes; as many hopeless operations as a batch holds."""
    regions = 65_536
    pool = Pool(tmp_path / "p.pool", regions, ordered=ordered, regions=regions, tenants=tenants)
    handles = pool.fill(regions, most=regions)
    pool.free(handles[1::2])
    pool.step([])
    kept = handles[::2]
    used = [Used(handle, UNIT, True) for handle in kept]  # so that nothing can be done
    ops = [pool.allocate(3 + i, "sure") for i in range(MOST_OPS // 2)]
    ops += [Extend(handle, 40 * UNIT) for handle in kept[: MOST_OPS // 2]]
    results = pool.step(ops, used)
    told = {result.reason for result in results if isinstance(result, Refusal)}
    assert told <= {Reason.PINNED, Reason.FRAGMENTED, Reason.WAITS_FOR_COMPLETION, Reason.CLAIMED}
    assert PLAN_STEPS <= pool.steps() <= PLAN_STEPS + SEARCHES * pool.runs
    assert isinstance(pool.step([pool.allocate(1, "sure")], used)[0], Place), "it goes on"


def keys_of(number, granules):
    return b"".join(b"%8d%8d" % (number, i) for i in range(granules))


@pytest.mark.parametrize("ordered", [ORDERED, ANY_ORDER])
def test_no_batch_gives_up_and_looks_up_beyond_its_budget(tmp_path, ordered):
    """As many kept runs as the table holds, and as many requests that want their place."""
    runs, granule = 8192, 64
    pool = Pool(tmp_path / "p.pool", runs * 4, ordered=ordered, regions=runs, granule=granule)
    for first in range(0, runs, 2048):
        ops = [
            Allocate(f"{i}", 64, max_total_tokens=64, keys=keys_of(i // 64, 1))
            for i in range(first, first + 2048)
        ]
        handles = [place.handle for place in pool.step(ops)]
        pool.step([Free(handle, End.ABORTED, 0, 64) for handle in handles])
    pool.step([])
    assert pool.arena.report().reuse.kept_runs == runs
    runs_looked_at = 2 * pool.arena.geometry.most_entries + 2
    pool.step([pool.allocate(9) for _ in range(2048)])
    assert pool.steps() <= PLAN_STEPS + SEARCHES * runs_looked_at
    assert pool.arena.report().reuse.kept_runs < runs
    looks_up = [
        Allocate(f"again {i}", 130, max_total_tokens=130, keys=keys_of(127, 2)) for i in range(2048)
    ]
    pool.step(looks_up)
    assert pool.steps() <= PLAN_STEPS + SEARCHES * runs_looked_at
    pool.arena.check()


def test_long_holes_of_about_one_length_are_searched_within_the_budget(tmp_path):
    holes, length = 4_000, 2_049
    blocks = holes * (length + 1)
    pool = Pool(tmp_path / "p.pool", blocks, ordered=ANY_ORDER, regions=2 * holes + 8)
    large, ops = [], []
    for _ in range(holes):
        ops += [pool.allocate(length), pool.allocate(1)]
    for at in range(0, len(ops), MOST_OPS):
        large += [place.handle for place in pool.step(ops[at : at + MOST_OPS])][::2]
    pool.free(large)
    pool.step([])
    results = pool.step([pool.allocate(length) for _ in range(holes)])
    assert all(isinstance(result, Place) for result in results)
    assert pool.steps() <= PLAN_STEPS + SEARCHES * pool.runs


# --- who is refused, and what for ---


def test_two_requests_of_a_batch_have_two_ids(tmp_path):
    pool = Pool(tmp_path / "p.pool", 64, ordered=ORDERED, regions=8)
    op = pool.allocate(1)
    first, second, other = pool.step([op, op, pool.allocate(1)])
    assert isinstance(first, Place)
    assert isinstance(other, Place)
    assert second.reason == Reason.INVALID
    assert second.field.startswith("request_id: ")
    again = pool.step([op])[0]
    assert again.handle == first.handle, "a batch may ask again for what another has asked for"


def limited(path, *, start=Start.MAXIMUM, **fields):
    pool = Pool(path, 100, ordered=ORDERED, regions=32)
    pool.arena.set_policy(PolicyRecord("limited", start, Overflow.PREEMPT, UNIT, **fields))
    return pool


def test_what_its_tenant_can_never_hold_is_invalid_and_tells_the_bound(tmp_path):
    pool = limited(tmp_path / "p.pool", tenant_share=0.25)
    large, small = pool.allocate(50, "x"), pool.allocate(1, "y")
    results = pool.step([large, small], pass_refused=False)
    assert results[0].reason == Reason.INVALID
    assert results[0].field == "max_total_tokens: at most what its tenant may hold (400 tokens)"
    assert isinstance(results[1], Place)
    pool = limited(tmp_path / "q.pool", tenant_share=0.25, start=Start.STEP)
    results = pool.step([pool.allocate(26, "x", most=90), pool.allocate(25, "x", most=90)])
    assert results[0].reason == Reason.INVALID
    assert results[0].field.startswith("prompt_tokens: ")
    assert results[0].field.endswith("(400 tokens)")
    assert isinstance(results[1], Place)


def test_a_maximum_holds_up_only_its_own_tenant(tmp_path):
    pool = limited(tmp_path / "p.pool", tenant_share=0.25)
    ops = [pool.allocate(n, tenant) for n, tenant in ((20, "x"), (9, "x"), (1, "x"), (1, "y"))]
    results = pool.step(ops, pass_refused=False)
    assert [type(r) is Place or r.reason for r in results] == [
        True,
        Reason.QUOTA,
        Reason.SKIPPED,
        True,
    ]
    assert isinstance(pool.step([ops[2]])[0], Place), "in the next batch it may be asked first"


def test_who_has_outgrown_its_tenants_maximum_and_made_way_comes_back(tmp_path):
    pool = limited(tmp_path / "p.pool", tenant_share=0.25, start=Start.STEP)
    op = pool.allocate(20, "x", most=90)
    handle = pool.step([op])[0].handle
    assert isinstance(pool.step([Extend(handle, 60 * UNIT)])[0], Place)
    pool.step([Free(handle, End.PREEMPTED, 40 * UNIT)])
    beside = pool.step([pool.allocate(1, "x")])[0].handle
    back = op._replace(generated_tokens=40 * UNIT)
    assert pool.step([back])[0].reason == Reason.QUOTA
    pool.step([Free(beside, End.ABORTED, 0)])
    assert isinstance(pool.step([back])[0], Place)


def test_a_name_made_to_have_another_ones_hash_is_another_tenant(tmp_path):
    made = "ig6i3c24-u8xia8mre3sar6bc/t:ixDo"
    pool = limited(tmp_path / "p.pool", tenant_share=0.05, tenants=(TenantShare("chat", 0.5),))
    assert pool.step([pool.allocate(30, made)])[0].reason == Reason.INVALID
    assert isinstance(pool.step([pool.allocate(5, made)])[0], Place)
    assert pool.arena.tenants()[0].held_tokens == 0


def test_nobody_new_is_named_while_what_is_on_its_way_would_do(tmp_path):
    pool = Pool(tmp_path / "p.pool", 8, ordered=ANY_ORDER, regions=16, moves=Moves.NONE)
    handles = pool.fill(8, most=8)
    grow = [Extend(handles[0], 2 * UNIT)]
    named = pool.step(grow)[0].preempt_handle
    assert named == handles[-1]
    pool.step([Free(handles[1], End.PREEMPTED, 0)])
    result = pool.step(grow, completes=False)[0]
    assert (result.reason, result.preempt_handle) == (Reason.WAITS_FOR_COMPLETION, 0)
    assert isinstance(pool.step(grow)[0], Place)
