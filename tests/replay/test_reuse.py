"""Reuse: requests that wait for the answers their prompts contain, and what is kept for them."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from plain_replay import serve_plainly
from talking import BLOCK, conversations
from typer.testing import CliRunner

from odma_service import replay, traces
from odma_service.cli import app
from odma_service.errors import InvalidError
from odma_service.replay.keys import keys_of
from odma_service.replay.load import Limits, limits_for, load_of, shuffled
from odma_service.replay.loop import serve
from odma_service.replay.memory import Placed
from odma_service.replay.policies import (
    IDEAL_BEST,
    NAMES,
    PREFIX_POLICIES,
    REUSE,
    memory_of,
    read_tuning,
    record_of,
)
from odma_service.replay.pooled import EngineKind, PoolMemory
from odma_service.replay.prices import Prices, Serving
from odma_service.replay.rivals.paging import PagedMemory
from odma_service.replay.rivals.prefix import PrefixMemory
from odma_service.traces.trace import Waits
from odma_service.values import KEY_BYTES, Answer, End, Free, Freed, Place

DATA = Path(os.environ.get("ODMA_DATA_DIR", Path(__file__).parents[3] / "shared/data"))
SERVING = Serving()
SECOND = 10**12
A_STEP_A_SECOND = Prices(SECOND, 0, 0, 0, 0, 0)
SMALL = 12_000  # tokens
MEMORIES = [name for name in NAMES if name != IDEAL_BEST]


def talk(name, load, directory, serve_by=serve, **how):
    with memory_of(name, load, SERVING, read_tuning().of(name), directory, batch_cap=32) as memory:
        prices = SERVING.prices(memory.kv_bandwidth_share)
        return serve_by(load, memory, prices, batch_cap=32, **how)


def small_load(users=12, turns=9, seed=4, capacity=SMALL, **others):
    trace = conversations(users, turns, seed, **others)
    return load_of(trace, limits_for(trace, capacity, 300))


# --- who waits ---


def waiting(after, gaps, *, came=None, answers=None, prompts=None, ids=None):
    count = len(after)
    return traces.Trace(
        np.array(came or [0.0] * count),
        np.array(prompts or [16] * count),
        np.array(answers or [3] * count),
        "waiting",
        prefix_ids=ids,
        block_tokens=16,
        waits=Waits(np.array(after), np.array(gaps)),
    )


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "open"])
@pytest.mark.parametrize("serve_by", [serve, serve_plainly])
def test_a_request_comes_its_gap_after_the_answer_it_waits_for(serve_by, closed):
    """Answers of 3 tokens, a second each; the last waits for nobody."""
    trace = waiting([-1, 0, 1, -1], [0.0, 2.0, 0.25, 9.0], came=[0.5, 0.5, 1.0, 20.0])
    load = load_of(trace, Limits(16, 64, 1_024))
    history = serve_by(load, PagedMemory(1_024, 16, 0.0), A_STEP_A_SECOND, closed=closed)
    assert [ps / SECOND for ps in history.finished_ps] == [3.5, 8.5, 11.75, 23.0]
    assert [ps / SECOND for ps in history.first_ps] == [1.5, 6.5, 9.75, 21.0]


def test_waits_are_as_much_faster_as_arrivals():
    trace = waiting([-1, 0], [0.0, 2.0], came=[4.0, 4.0])
    load = load_of(trace, Limits(16, 64, 1_024), rate=2)
    history = serve(load, PagedMemory(1_024, 16, 0.0), A_STEP_A_SECOND, closed=False)
    assert [ps / SECOND for ps in history.arrived_ps] == [2.0, 6.0]


def test_who_waited_for_a_request_that_is_left_out_waits_for_what_that_waited_for():
    """The second cannot fit, and the first is skipped in the second load."""
    trace = waiting([-1, 0, 1], [0.0, 2.0, 3.0], came=[0.0, 1.0, 7.0], prompts=[16, 5_000, 16])
    load = load_of(trace, Limits(16, 6_000, 1_024))
    assert (load.after, load.gaps_seconds) == ((-1, 0), (0.0, 5.0))
    rest = load_of(trace.without_first(1), Limits(16, 6_000, 1_024))
    assert (rest.after, rest.arrivals_seconds) == ((-1,), (7.0,))


def test_who_waits_may_pass_another_as_soon_as_he_comes(tmp_path):
    load = small_load()
    fast = talk("elastic", load, tmp_path, overtake=6)
    plain = talk("elastic", load, tmp_path, serve_plainly, overtake=6)
    assert (fast.sums, fast.arrived_ps) == (plain.sums, plain.arrived_ps)


@pytest.mark.parametrize("common_blocks", [0, 40])
@pytest.mark.parametrize("name", [name for name in MEMORIES if name != REUSE])
def test_skipping_steps_changes_nothing_where_requests_wait(name, common_blocks, tmp_path):
    load = small_load(common_blocks=common_blocks)
    fast = talk(name, load, tmp_path)
    plain = talk(name, load, tmp_path, serve_plainly)
    assert fast.sums == plain.sums
    assert fast.finished == plain.finished
    assert (fast.arrived_ps, fast.first_ps) == (plain.arrived_ps, plain.first_ps)
    assert (fast.prompt_tokens, fast.reused_tokens) == (plain.prompt_tokens, plain.reused_tokens)
    assert fast.emptied == plain.emptied
    assert sorted(fast.finished) == list(range(len(load)))


@pytest.mark.parametrize("common_blocks", [0, 40])
def test_what_is_given_up_depends_little_on_how_often_a_pool_is_asked(common_blocks, tmp_path):
    """A pool tells by its calls how long ago a run was used; the plain loop calls more often."""
    load = small_load(common_blocks=common_blocks)
    fast, plain = (talk(REUSE, load, tmp_path, loop) for loop in (serve, serve_plainly))
    assert sorted(fast.finished) == sorted(plain.finished) == list(range(len(load)))
    assert fast.sums[-1].tokens == plain.sums[-1].tokens
    assert fast.sums[-1].now_ps == pytest.approx(plain.sums[-1].now_ps, rel=0.02)
    assert fast.reused_tokens == pytest.approx(plain.reused_tokens, rel=0.05)


@pytest.mark.parametrize("name", ["agents_16", "agents_32_common4k"])
def test_skipping_steps_changes_nothing_on_sessions_of_agents(name, tmp_path):
    path = DATA / "traces" / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    trace = traces.read_trace(path, 120)
    load = load_of(trace, limits_for(trace, 40_000, 500))
    fast = talk("ideal-16-prefix-once", load, tmp_path)
    plain = talk("ideal-16-prefix-once", load, tmp_path, serve_plainly)
    assert fast.sums == plain.sums
    assert fast.reused_tokens == plain.reused_tokens > 0


def test_requests_that_wait_have_one_order():
    with pytest.raises(InvalidError, match="wait for answers"):
        shuffled(conversations(2, 2, 1), 1)


# --- what a trace says ---


def test_waits_survive_a_file(tmp_path):
    trace = conversations(3, 3, 1)
    path = tmp_path / "sessions.parquet"
    session = np.arange(9) % 3
    waits = trace.waits._replace(session=session)
    traces.write_trace(traces.Trace(
        trace.t_seconds, trace.input_tokens, trace.output_tokens, "s", waits=waits,
    ), path)  # fmt: skip
    again = traces.read_trace(path).waits
    for before, after in zip(waits, again, strict=True):
        assert np.array_equal(before, after)
    described = json.loads(CliRunner().invoke(
        app, ["trace", "describe", str(path), "--json"]).stdout)  # fmt: skip
    assert (described["waiting_requests"], described["sessions"]) == (6, 3)
    assert "wait for an answer" in CliRunner().invoke(app, ["trace", "describe", str(path)]).stdout


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"after_row": [-1, 1], "gap_seconds": [0.0, 0.0]}, "row 2, column 'after_row': 1 is not"),
        ({"after_row": [-2, 0], "gap_seconds": [0.0, 0.0]}, "row 1, column 'after_row': -2 is not"),
        ({"after_row": [-1, 0], "gap_seconds": [0.0, -1.0]}, "row 2, column 'gap_seconds'"),
        ({"after_row": [-1, None], "gap_seconds": [0.0, 0.0]}, "must be whole numbers"),
        ({"after_row": [-1, 0]}, "column 'gap_seconds' is missing"),
        ({"after_row": [-1, 0], "gap_seconds": [0.0, 1.0], "session": ["a", "b"]}, "'session'"),
    ],
)
def test_waits_that_cannot_be_are_refused(tmp_path, columns, message):
    path = tmp_path / "wrong.parquet"
    lengths = {"t_seconds": [0.0, 1.0], "input_tokens": [5, 5], "output_tokens": [5, 5]}
    pq.write_table(pa.table(lengths | columns), path)
    with pytest.raises(traces.TraceError, match=message):
        traces.read_trace(path)


# --- the rivals ---


def test_an_answer_is_known_by_the_request_that_waits_for_it_and_contains_it():
    ids = ((1,), (1, 2, 3), (1, 9, 8))
    trace = waiting([-1, 0, 0], [0.0] * 3, prompts=[17, 50, 50], answers=[18, 3, 3], ids=ids)
    assert load_of(trace, Limits(32, 96, 1_024)).requests[0].block_ids in {(1, 2), (1, 9)}
    shorter = waiting([-1, 0], [0.0] * 2, prompts=[17, 34], answers=[18, 3], ids=ids[:2])
    assert load_of(shorter, Limits(32, 96, 1_024)).requests[0].block_ids == (1,)


def test_the_answer_is_not_prefilled_again():
    ids = ((1,), (1, 2, 3))
    trace = waiting([-1, 0], [0.0] * 2, prompts=[17, 50], answers=[18, 3], ids=ids)
    load = load_of(trace, Limits(32, 96, 1_024))
    memory = PrefixMemory(1_024, 16, 0.0, block_tokens=16)
    assert serve(load, memory, A_STEP_A_SECOND).reused_tokens == 32


def test_kernels_that_read_shared_pages_once_read_less():
    """Two of 1,040 tokens share 1,024: the second's own KV alone is read for it."""
    trace = traces.Trace(
        np.zeros(2), np.array([1_040, 1_040]), np.array([2, 2]), "two",
        prefix_ids=((1, 2, 3), (1, 2, 4)),
    )  # fmt: skip
    load = load_of(trace, Limits(16, 4_096, 4_096))
    prices = Prices(100, 1, 0, 0, 0, 0)
    seconds = [
        serve(load, PrefixMemory(4_096, 16, 0.0, reads_once=once), prices).sums[-1].now_ps
        for once in (False, True)
    ]
    assert seconds == [100 + 2_080 + 100 + 2_082, 100 + 1_056 + 100 + 1_058]


class PlainPrefix:
    """The same cache, too simple to be wrong: everything is counted anew from who runs."""

    def __init__(self, capacity, page, headroom, block):
        self.pages, self.page, self.block = capacity // page, page, block
        self.keep = -int(-self.pages * headroom // 1)
        self.running = {}  # number: (blocks shared, pages)
        self.kept = []  # blocks that nobody has, the next to go first

    def used(self):
        blocks = {block for blocks, _ in self.running.values() for block in blocks}
        own = sum(pages - len(b) * (self.block // self.page) for b, pages in self.running.values())
        return own + len(blocks) * (self.block // self.page), blocks

    def shrink(self, room):
        while self.kept and self.used()[0] + len(self.kept) * (self.block // self.page) > room:
            self.kept.pop(0)

    def end(self, run, written):
        self.running.pop(run.number)
        used = self.used()[1]
        ids = run.request.block_ids[: written // self.block]
        for block in reversed([block for block in ids if block not in used]):
            self.kept = [*(b for b in self.kept if b != block), block]

    def decide(self, step):
        for run, end, output in step.ended:
            if end is not End.PREEMPTED:
                self.end(run, run.request.prompt_tokens + output)
        youngest, victims = list(step.running.values()), []
        for run in step.full:
            while run not in victims:
                if self.used()[0] < self.pages:
                    blocks, pages = self.running[run.number]
                    self.shrink(self.pages - 1)
                    self.running[run.number] = blocks, pages + 1
                    break
                victims.append(youngest.pop())
                self.end(victims[-1], victims[-1].lead + step.tick)
        placed = []
        for number, request, generated in () if victims else step.asked:
            held = request.prompt_tokens + generated
            blocks = request.block_ids[: held // self.block]
            pages = -(-(held + 1) // self.page)
            known = {*self.used()[1], *self.kept}
            before = self.running
            self.running = {**before, number: (blocks, pages)}
            if self.used()[0] > self.pages - (self.keep if before or step.running else 0):
                self.running = before
                break
            self.kept = [block for block in self.kept if block not in blocks]
            self.shrink(self.pages)
            misses = [index for index, block in enumerate(blocks) if block not in known]
            hits = misses[0] if misses else len(blocks)
            placed.append((pages * self.page, min(hits * self.block, held - 1)))
        counted = Counter(block for blocks, _ in self.running.values() for block in blocks)
        return placed, victims, sum(n - 1 for n in counted.values()) * self.block


@pytest.mark.parametrize(("headroom", "common_blocks"), [(0.02, 0), (0.0, 0), (0.0, 20)])
def test_a_prefix_cache_is_what_counting_anew_gives(headroom, common_blocks):
    load = small_load(16, 8, seed=7, common_blocks=common_blocks)
    seen = Counter()

    class Compared(PrefixMemory):
        twin = PlainPrefix(SMALL, 16, headroom, BLOCK)

        def decide(self, step):
            expected = self.twin.decide(step)
            decision = super().decide(step)
            placed = [(p.room, p.reused_tokens) for p in decision.placed if isinstance(p, Placed)]
            assert (placed, decision.unread_tokens) == (expected[0], expected[2])
            assert set(decision.victims) == set(expected[1])
            seen.update(hits=sum(reused > 0 for _, reused in placed), victims=len(expected[1]))
            seen.update(shared=decision.unread_tokens)
            return decision

    memory = Compared(SMALL, 16, headroom, 1.0, BLOCK, reads_once=True)
    history = serve(load, memory, SERVING.prices(), batch_cap=32)
    assert sorted(history.finished) == list(range(len(load)))
    assert seen["hits"]
    assert bool(seen["shared"]) == bool(common_blocks)
    assert seen["victims"] or headroom


def test_a_comparison_says_what_was_reused(tmp_path):
    trace = conversations(10, 6, 2, common_blocks=20)
    setting = replay.Setting(limits_for(trace, SMALL, 300), batch_cap=32)
    names = ["elastic", *PREFIX_POLICIES]
    facts = replay.as_object(replay.compare(trace, names, setting, read_tuning(), tmp_path))
    assert facts["waiting_requests"] == 50
    assert facts["assumptions"]["loop"] == "after answers, waits x 1"
    rows = facts["policies"]
    assert rows["elastic"]["reused_tokens"] == 0
    for name in PREFIX_POLICIES:
        assert 0 < rows[name]["reused_tokens"] < rows[name]["prompt_tokens"]
        assert rows[name]["ttft_p50_s"] < rows["elastic"]["ttft_p50_s"]
    rates = [
        rows[n]["tokens_per_s"] for n in ("elastic", "ideal-16-prefix", "ideal-16-prefix-once")
    ]
    assert rates == sorted(rates)


# --- runs of an arena that begin alike ---


def test_without_ids_nothing_is_reused_and_nothing_is_otherwise(tmp_path):
    trace = conversations(10, 8, 3)
    load = load_of(replace(trace, prefix_ids=None), limits_for(trace, SMALL, 300))
    plain, reusing = (talk(name, load, tmp_path) for name in ("elastic", REUSE))
    assert plain.copies > 0
    assert reusing == plain


@pytest.mark.parametrize("granule_tokens", [64, 128])
def test_keys_stand_for_all_tokens_up_to_their_granules_end(granule_tokens):
    ids = (5, 6, 7, 8, 9)
    keys = keys_of(ids, BLOCK, granule_tokens)
    assert len(keys) == 5 * BLOCK // granule_tokens * KEY_BYTES
    assert (
        keys_of(ids[:2], BLOCK, granule_tokens) == keys[: 2 * BLOCK // granule_tokens * KEY_BYTES]
    )
    other = keys_of((4, *ids[1:]), BLOCK, granule_tokens)
    assert not {keys[i : i + 16] for i in range(0, len(keys), 16)} & {
        other[i : i + 16] for i in range(0, len(other), 16)
    }


def test_granules_shorter_than_blocks_have_keys_of_their_own():
    keys = keys_of((5, 6), 512, 128)
    assert len({keys[i : i + 16] for i in range(0, len(keys), 16)}) == 8


def test_a_beginning_that_was_kept_is_not_prefilled(tmp_path):
    """The second contains the first and its answer: two granules of 64."""
    ids = ((1,), (1, 2, 3))
    trace = waiting([-1, 0], [0.0] * 2, prompts=[70, 200], answers=[60, 3], ids=ids)
    load = load_of(replace(trace, block_tokens=64), limits_for(trace, SMALL, 300))
    assert talk(REUSE, load, tmp_path).reused_tokens == 128


@pytest.mark.parametrize("common_blocks", [0, 20])
def test_what_is_reused_comes_near_a_prefix_cache(common_blocks, tmp_path):
    trace = conversations(12, 8, 5, common_blocks=common_blocks)
    setting = replay.Setting(limits_for(trace, 2 * SMALL, 300), batch_cap=32)
    names = ["elastic", REUSE, "ideal-16-prefix"]
    facts = replay.as_object(replay.compare(trace, names, setting, read_tuning(), tmp_path))
    rows = facts["policies"]
    row = rows[REUSE]
    assert row["adopted_tokens"] + row["gathered_tokens"] == row["reused_tokens"]
    assert row["reused_tokens"] > 0.7 * rows["ideal-16-prefix"]["reused_tokens"]
    assert row["tokens_per_s"] > rows["elastic"]["tokens_per_s"]
    assert bool(row["gathered_tokens"]) >= bool(common_blocks)


class SharingPool(PoolMemory):
    """A pool with room for all, where each reads the first 64 tokens of who had them first."""

    def __init__(self, load, kind):
        record = record_of("elastic", load.limits, {})
        super().__init__(record, kind, block_tokens=load.block_tokens)
        self.end, self.first = 0, {}

    def _apply(self, step, batch):
        results = []
        for op in batch.ops:
            if isinstance(op, Free):
                results.append(Freed())
                continue
            length, shared = op.max_total_tokens, BLOCK * (op.keys[:KEY_BYTES] in self.first)
            at = self.first.setdefault(op.keys[:KEY_BYTES], self.end)
            results.append(Place(self.end + 1, self.end, length, shared, at * bool(shared), shared))
            self.end += length
        return Answer(batch.seq, False, results, [], [], 1), False


def test_a_beginning_that_is_read_in_place_is_read_once():
    """Three of 70 tokens read 64 in one place; the second run costs the reading of 5 more."""
    trace = traces.Trace(
        np.zeros(4), np.full(4, 70), np.array([2, 2, 2, 2]), "four",
        prefix_ids=((1,), (1,), (1,), (2,)), block_tokens=BLOCK,
    )  # fmt: skip
    load = load_of(trace, Limits(16, 96, 1_024))
    kind = EngineKind(granule_tokens=BLOCK, reads_two_runs=True, second_run_tokens=5)
    prices = Prices(0, 1, 0, 0, 0, 0)
    histories = [
        serve_by(load, SharingPool(load, kind), prices) for serve_by in (serve, serve_plainly)
    ]
    for history in histories:
        assert history.reused_tokens == 2 * BLOCK
        unread = BLOCK - 2 * 5  # two read the first's beginning: one of them for both
        assert history.sums[-1].now_ps == (4 * 70 - unread) + (4 * 71 - unread)
