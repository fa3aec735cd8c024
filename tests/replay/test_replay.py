"""The replay: simulated serving over real arenas and counted pages."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_replay import serve_plainly

from odma_service import replay, traces
from odma_service.errors import InvalidError
from odma_service.pool import geometry
from odma_service.pool.policy import named
from odma_service.replay.arena import ArenaMemory
from odma_service.replay.compare import compare
from odma_service.replay.load import Limits, limits_for, load_of, shuffled
from odma_service.replay.loop import History, Sums, serve
from odma_service.replay.measure import interval, measure, window_of
from odma_service.replay.memory import Asked
from odma_service.replay.policies import (
    ARENA_POLICIES,
    IDEAL_BEST,
    NAMES,
    memory_of,
    read_tuning,
    record_of,
)
from odma_service.replay.pooled import EngineKind
from odma_service.replay.predict import predictor
from odma_service.replay.prices import Prices, Serving
from odma_service.replay.rivals.extents import ExtentMemory
from odma_service.replay.rivals.paging import PagedMemory
from odma_service.replay.rivals.prefix import PrefixMemory

SERVING = Serving()
TUNING = read_tuning()
MEMORIES = [name for name in NAMES if name != IDEAL_BEST]
SMALL = 12_000  # tokens: short of memory with a few hundred requests


def small_load(rows=150, seed=3, *, rate=1.0):
    trace = traces.generate(rows, seed, max_output_tokens=1_500)
    return load_of(trace, limits_for(trace, SMALL), rate=rate)


def run(name, load, directory, serve_by=serve, **how):
    with memory_of(name, load, SERVING, TUNING.of(name), directory, batch_cap=32) as memory:
        prices = SERVING.prices(memory.kv_bandwidth_share)
        return serve_by(load, memory, prices, batch_cap=32, **how)


# --- the loop ---


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "open"])
@pytest.mark.parametrize("name", MEMORIES)
def test_skipping_steps_changes_nothing(name, closed, tmp_path):
    load = small_load(rate=0.5)
    fast = run(name, load, tmp_path, closed=closed)
    plain = run(name, load, tmp_path, serve_plainly, closed=closed)
    assert fast.sums == plain.sums
    assert fast.finished == plain.finished
    assert fast.first_ps == plain.first_ps
    assert fast.emptied == plain.emptied
    assert (fast.preemptions, fast.recomputed_tokens) == (
        plain.preemptions,
        plain.recomputed_tokens,
    )
    assert (fast.copies, fast.copied_tokens) == (plain.copies, plain.copied_tokens)


def test_skipping_steps_changes_nothing_where_the_preempted_are_swapped(tmp_path):
    load = small_load(rate=0.5)
    prices = Serving(swap_bytes_per_second=16e9).prices()
    histories = []
    for serve_by in (serve, serve_plainly):
        with memory_of("ideal-16", load, SERVING, {}, tmp_path, batch_cap=32) as memory:
            histories.append(serve_by(load, memory, prices, batch_cap=32))
    fast, plain = histories
    assert fast.sums == plain.sums
    assert fast.preemptions > 0
    assert fast.recomputed_tokens == 0 < fast.swapped_tokens


@pytest.mark.parametrize("overtake", [4, 20])
def test_skipping_steps_changes_nothing_where_requests_may_pass(overtake, tmp_path):
    load = small_load()
    fast = run("elastic", load, tmp_path, overtake=overtake)
    plain = run("elastic", load, tmp_path, serve_plainly, overtake=overtake)
    assert (fast.sums, fast.finished) == (plain.sums, plain.finished)
    assert fast.sums[-1].now_ps < run("elastic", load, tmp_path).sums[-1].now_ps
    assert min(fast.arrived_ps) >= 0


def test_most_steps_are_skipped_where_little_happens(tmp_path):
    history = run("static", small_load(), tmp_path)
    assert history.decisions * 5 < history.steps


def test_what_a_batch_has_no_room_for_waits_a_step(tmp_path):
    sizes = []

    class Narrow(ArenaMemory):
        max_ops = 9

        def _apply(self, step, batch):
            sizes.append(len(step.ended) + len(step.full) + len(step.asked))
            return super()._apply(step, batch)

    load = small_load(80)
    record = record_of("elastic", load.limits, TUNING.of("elastic"))
    live = predictor("live", load, 0)
    with Narrow(tmp_path, load.limits, SERVING, record, EngineKind(), live) as memory:
        history = serve(load, memory, SERVING.prices(), batch_cap=32)
    assert sorted(history.finished) == list(range(len(load)))
    assert history.sums[-1].tokens == sum(r.output_tokens for r in load.requests)
    assert max(sizes) == Narrow.max_ops


@pytest.mark.parametrize("name", MEMORIES)
def test_every_request_gets_all_of_its_tokens(name, tmp_path):
    load = small_load()
    history = run(name, load, tmp_path)
    assert sorted(history.finished) == list(range(len(load)))
    assert history.sums[-1].tokens == sum(r.output_tokens for r in load.requests)


def test_the_open_loop_admits_nobody_before_he_arrives(tmp_path):
    load = small_load(rate=0.01)
    history = run("elastic", load, tmp_path, closed=False)
    assert all(a < f for a, f in zip(history.arrived_ps, history.first_ps, strict=True))
    assert history.sums[-1].now_ps >= load.arrivals_seconds[-1] * 10**12


def test_moving_memory_beats_reserving_it(tmp_path):
    seconds = {
        name: run(name, small_load(400), tmp_path).sums[-1].now_ps
        for name in ("static", "elastic", "ideal-16")
    }
    assert seconds["ideal-16"] < seconds["elastic"] < seconds["static"]


# --- prices ---


@given(
    st.tuples(*[st.integers(0, 3_000)] * 2, *[st.integers(0, 300)] * 2),
    st.integers(0, 40),
    st.integers(0, 300),
    st.integers(1, 60),
)
def test_steps_together_take_as_long_as_one_by_one(numbers, running, written, steps):
    prices = Prices(*numbers, 0, 0)
    one_by_one = [prices.decode(running, written + running * j, 1) for j in range(steps)]
    together = prices.decode(running, written, steps)
    assert together.ps == sum(one.ps for one in one_by_one)
    assert together.token_ps == sum(one.token_ps for one in one_by_one)


@given(st.integers(1, 40), st.integers(0, 300), st.integers(1, 60), st.integers(0, 10**6))
def test_steps_until_is_the_first_moment_reached(running, written, most, ps):
    prices = Prices(1_000, 7, 50, 1, 0, 0)
    steps = prices.steps_until(running, written, most, ps)
    assert steps == most or prices.decode(running, written, steps).ps >= ps
    assert steps == 1 or prices.decode(running, written, steps - 1).ps < ps


def test_the_device_of_the_design_decodes_in_about_60_ms():
    prices = SERVING.prices()
    assert 0.052e12 < prices.decode(1, 0, 1).ps < 0.054e12, "15.2 GB at 0.93 of 307.2 GB/s"
    copied = prices.copies_ps(1, 4_096)
    assert 1.65e9 < copied < 1.8e9, "4,096 tokens of KV: 1.5 ms at peak bandwidth"


def test_short_runs_cost_bandwidth_as_the_emulation_says():
    shares = [SERVING.page_share(page) for page in (16, 64, 256)]
    assert shares == sorted(shares)
    assert 0.84 < shares[0] < 0.92, "the cycle-level simulator: 0.855"
    assert shares[2] > 0.97


def test_figures_of_a_real_card_win(tmp_path):
    packaged = Path(geometry.__file__).parents[1] / "data" / "mlu370-x4.toml"
    own = tmp_path / "card.toml"
    measured = "[[measured]]\nrun_bytes = 1048576\nwindow = 16\nbytes_per_second = 200e9\n"
    own.write_text(packaged.read_text() + measured)
    assert replay.Serving(own).sequential_bytes_per_second == pytest.approx(200e9, rel=0.01)


# --- loads ---


def test_a_maximum_is_the_same_for_every_policy_and_prompts_are_not_cut():
    trace = traces.Trace(np.zeros(4), np.array([10, 90, 100, 200]), np.array([50, 5, 1, 1]), "four")
    load = load_of(trace, Limits(20, 100, 100))
    assert load.dropped == 2
    assert [
        (r.prompt_tokens, r.total_tokens, r.maximum_tokens, r.limited) for r in load.requests
    ] == [
        (10, 30, 30, True),
        (90, 95, 100, False),
    ]


def test_a_request_whose_maximum_exceeds_the_pool_never_fits():
    trace = traces.Trace(np.zeros(2), np.array([400, 401]), np.array([5, 5]), "two")
    load = load_of(trace, Limits(100, 1_000, 500))
    assert [(r.prompt_tokens, r.maximum_tokens) for r in load.requests] == [(400, 500)]


def test_an_answer_exactly_as_long_as_the_limit_has_met_it():
    trace = traces.Trace(np.zeros(3), np.array([10, 10, 95]), np.array([19, 20, 5]), "three")
    assert [r.limited for r in load_of(trace, Limits(20, 100, 100)).requests] == [
        False,
        True,
        False,
    ]


def test_limits_default_to_what_cuts_nothing_off():
    trace = traces.Trace(np.zeros(1), np.array([500]), np.array([9_000]), "one")
    assert limits_for(trace, 111_000) == Limits(9_000, 9_500, 110_992, 256)
    assert limits_for(trace, 4_000).model_length_tokens == 4_000


def test_a_load_that_never_fits_is_refused():
    trace = traces.Trace(np.zeros(1), np.array([500]), np.array([9]), "one")
    with pytest.raises(InvalidError):
        load_of(trace, Limits(100, 400, 400))


def test_what_no_whole_pages_hold_is_dropped_for_every_policy(tmp_path):
    """The pool has 2,992 tokens, which are 11 pages of 256 and less than a twelfth."""
    trace = traces.Trace(
        np.zeros(4), np.array([2_800, 2_800, 900, 2_992]), np.array([16, 17, 9, 1]), "four"
    )
    limits = limits_for(trace, 3_000)
    load = load_of(trace, limits)
    assert [request.total_tokens for request in load.requests] == [2_816, 909]
    assert load.dropped == 2
    setting = replay.Setting(limits)
    for name in MEMORIES:
        run = replay.run_policy(name, load, setting, TUNING, tmp_path)
        assert len(run.history.finished) == 2, name


def test_why_nothing_fits_is_said():
    trace = traces.Trace(np.zeros(2), np.array([500, 450]), np.array([9, 9]), "two")
    with pytest.raises(InvalidError, match=r"the shortest prompt has 450 tokens.* most 400"):
        load_of(trace, Limits(100, 400, 400))


def test_reordering_keeps_requests_and_seed_0_keeps_the_order():
    trace = traces.generate(300, 1)
    other = shuffled(trace, 1)
    assert shuffled(trace, 0) is trace
    assert sorted(other.input_tokens) == sorted(trace.input_tokens)
    assert not np.array_equal(other.input_tokens, trace.input_tokens)
    assert np.array_equal(other.output_tokens, shuffled(trace, 1).output_tokens)


# --- rivals ---


def test_paging_preempts_the_youngest_when_no_page_is_free():
    trace = traces.Trace(np.zeros(2), np.array([16, 16]), np.array([40, 40]), "two")
    load = load_of(trace, Limits(48, 64, 64))
    history = serve(load, PagedMemory(64, 16, 0.0), SERVING.prices())
    assert history.finished == [0, 1]
    assert history.preemptions == 1


def prefixed(prompts, ids):
    """Return a load of prompts with the ids of their blocks, one token of answer each."""
    count = len(prompts)
    trace = traces.Trace(
        np.arange(count, dtype=float),
        np.array(prompts),
        np.full(count, 2),
        "prefixed",
        prefix_ids=tuple(map(tuple, ids)),
    )
    return load_of(trace, Limits(16, 4_096, 4_096))


def test_a_shared_prefix_is_prefilled_once_and_only_in_whole_blocks():
    load = prefixed([1_100, 1_100, 600], [(1, 2, 3), (1, 2, 4), (1, 5)])
    cached = serve(load, PrefixMemory(4_096, 16, 0.0), SERVING.prices(), batch_cap=1)
    assert cached.reused_tokens == 1_024 + 512
    plain = serve(load, PagedMemory(4_096, 16, 0.0), SERVING.prices(), batch_cap=1)
    assert plain.reused_tokens == 0
    assert cached.sums[-1].prefill_ps < plain.sums[-1].prefill_ps


def test_the_least_recently_used_prefix_makes_room():
    prompts, ids = [1_536, 1_536, 1_536, 1_536], [(1, 2, 3), (4, 5, 6), (7, 8, 9), (1, 2, 3)]
    history = serve(
        prefixed(prompts, ids), PrefixMemory(4_096, 16, 0.0), SERVING.prices(), batch_cap=1
    )
    assert history.reused_tokens < 1_536, "it was evicted, at least from its end"
    assert len(history.finished) == 4


def test_extents_are_few_and_never_overlap():
    load = small_load(300)

    class Watched(ExtentMemory):
        def decide(self, step):
            decision = super().decide(step)
            used = sorted(extent for held in self._held.values() for extent in held)
            everything = sorted([*used, *self._holes])
            ends = [start + length for start, length in everything]
            assert [start for start, _ in everything] == [0, *ends[:-1]]
            assert ends[-1] == load.limits.capacity_tokens // 16
            assert all(len(held) <= 2 for held in self._held.values())
            return decision

    memory = Watched(load.limits.capacity_tokens, 2, 64, 0.05)
    history = serve(load, memory, SERVING.prices(), batch_cap=32)
    assert len(history.finished) == len(load)
    assert history.copies > 0


def test_the_oracle_reserves_exact_totals(tmp_path):
    load = small_load()
    with memory_of("oracle", load, SERVING, {}, tmp_path) as memory:
        serve(load, memory, SERVING.prices())
        assert memory.pool.report().counters.extends == 0


@pytest.mark.parametrize("name", ARENA_POLICIES)
def test_tuned_parameters_make_a_record(name):
    record = record_of(name, Limits(4_096, 16_384, 110_992), TUNING.of(name))
    for field, value in TUNING.of(name).items():
        assert field == "buckets" or getattr(record, field) == value


@pytest.mark.parametrize(
    ("tuned", "name", "slides"),
    [("odma", "odma", True), ("elastic", "elastic", True), ("elastic-streams", "elastic", False)],
)
def test_the_service_starts_with_what_was_tuned(tuned, name, slides):
    limits = Limits(4_096, 16_384, 110_992)
    served = named(name, limits.model_length_tokens, limits.capacity_tokens, slides=slides)
    assert record_of(tuned, limits, TUNING.of(tuned)) == served


def test_predictors_say_what_they_know():
    load = small_load(50)
    asked = Asked(7, load.requests[7], 0)
    length = load.requests[7].output_tokens
    assert predictor("live", load, 0).quantiles(asked) is None
    assert set(predictor("exact", load, 0).quantiles(asked)) == {length}
    quantiles = predictor("lognormal:0.5", load, 0).quantiles(asked)
    assert list(quantiles) == sorted(quantiles)
    assert quantiles[2] != length
    with pytest.raises(InvalidError):
        predictor("lognormal:x", load, 0)


# --- measures ---


def history_of(count, emptied):
    sums = [Sums((i + 1) * 10**12, (i + 1) * 100, 0, (i + 1) * 10**12) for i in range(count)]
    everyone = list(range(count))
    return History([0] * count, [1] * count, [2] * count, sums, everyone, emptied)


def test_the_window_is_the_same_requests_for_all():
    assert window_of([history_of(100, 90), history_of(100, 70)]) == (10, 70, True)
    assert window_of([history_of(100, 90), history_of(100, 15)]) == (0, 100, False)


def test_a_rate_is_tokens_over_time_in_the_window():
    history = history_of(100, 90)
    measures = measure(history, window_of([history]), 1_000, [2] * 100)
    assert measures.tokens_per_s == pytest.approx(100)
    assert measures.requests_per_s == pytest.approx(1)


def test_an_interval_is_students():
    assert interval([5.0]) == (5.0, None)
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3))


# --- comparing ---


def test_a_comparison_has_every_figure(tmp_path):
    trace = traces.generate(300, 2, max_output_tokens=1_500)
    setting = replay.Setting(limits_for(trace, SMALL), batch_cap=64, seeds=2)
    comparison = compare(trace, ["elastic", "odma", "ideal-best"], setting, TUNING, tmp_path)
    facts = replay.as_object(comparison)
    assert facts["load_class"] == "memory-bound"
    assert facts["parameter_hash"] == TUNING.digest
    assert facts["assumptions"]["prefix_cache"] == "no prefix reuse"
    assert list(facts["policies"]) == ["ideal-16", "elastic", "odma", "ideal-best"]
    assert facts["policies"]["ideal-16"]["over_ideal_paging"] == 1
    assert (
        facts["policies"]["ideal-best"]["tokens_per_s"] > facts["policies"]["odma"]["tokens_per_s"]
    )
    for figures in facts["policies"].values():
        assert figures["tokens_per_s"] > 0
        assert figures["tokens_per_s_ci95"] > 0
        assert 0 < figures["utilisation_written_over_capacity"] <= 1
        assert figures["ttft_p50_s"] <= figures["ttft_p95_s"] <= figures["ttft_p99_s"]


@pytest.mark.parametrize(("rows", "seed", "capacity"), [(50, 2, 12_000), (150, 3, 25_000)])
def test_the_best_headroom_is_best_where_it_is_reported(rows, seed, capacity, tmp_path):
    """On weak loads, whose common window is not that which each headroom has alone."""
    trace = traces.generate(rows, seed, max_output_tokens=800)
    setting = replay.Setting(limits_for(trace, capacity, 800), batch_cap=64)
    comparison = compare(trace, ["static", "ideal-best"], setting, TUNING, tmp_path)
    for best, ideal in zip(comparison.rates(IDEAL_BEST), comparison.rates("ideal-16"), strict=True):
        assert best >= ideal


def test_answers_of_one_token_have_no_time_between_tokens(tmp_path):
    trace = traces.Trace(np.arange(30.0), np.full(30, 10), np.ones(30, int), "short")
    setting = replay.Setting(limits_for(trace, SMALL))
    comparison = compare(trace, ["elastic", "odma"], setting, TUNING, tmp_path)
    facts = replay.as_object(comparison)
    json.dumps(facts, allow_nan=False)
    assert facts["policies"]["odma"]["tpot_p99_s"] is None
    assert facts["policies"]["odma"]["ttft_p99_s"] > 0
    replay.write_report([comparison], tmp_path / "report")
    written = (tmp_path / "report" / "report.json").read_text()
    assert json.loads(written)[0]["policies"]["elastic"]["tpot_p50_s"] is None
    assert "nan" not in (tmp_path / "report" / "report.csv").read_text()
    if (page := tmp_path / "report" / "report.html").exists():
        assert "nan / nan" not in page.read_text()


def test_a_prefix_cache_has_blocks_of_the_trace(tmp_path):
    """Two prompts of 64 tokens that begin alike for 48: three blocks of 16."""
    trace = traces.Trace(
        np.zeros(2), np.array([64, 64]), np.array([9, 9]), "two",
        prefix_ids=((1, 2, 3, 4), (1, 2, 3, 5)), block_tokens=16,
    )  # fmt: skip
    limits = limits_for(trace, SMALL)
    setting = replay.Setting(limits, batch_cap=1)
    run = replay.run_policy("paged-16-prefix", load_of(trace, limits), setting, TUNING, tmp_path)
    assert run.history.reused_tokens == 48


def test_a_load_with_room_is_not_memory_bound(tmp_path):
    trace = traces.generate(100, 2, max_output_tokens=100)
    setting = replay.Setting(limits_for(trace, 2_000_000))
    comparison = compare(trace, [], setting, TUNING, tmp_path)
    assert not comparison.load_class.memory_bound


def test_a_report_is_files(tmp_path):
    trace = traces.generate(100, 2, max_output_tokens=500)
    setting = replay.Setting(limits_for(trace, SMALL), batch_cap=32)
    comparison = compare(trace, ["elastic"], setting, TUNING, tmp_path)
    replay.write_report([comparison], tmp_path / "report")
    assert (tmp_path / "report" / "report.json").exists()
    rows = (tmp_path / "report" / "report.csv").read_text().splitlines()
    assert len(rows) == 3


def test_parameters_are_read_with_their_hash(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text('{"elastic": {"safety_share": 0.1}}')
    assert read_tuning(path).of("elastic") == {"safety_share": 0.1}
    assert read_tuning(path).digest != TUNING.digest
    path.write_text('{"nobody": {}}')
    with pytest.raises(InvalidError):
        read_tuning(path)
