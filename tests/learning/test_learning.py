"""Learning: predictions from what was seen, bucket limits, and the safety share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odma_service.errors import (
    EpochError,
    InvalidError,
    NothingLearntError,
    SeqChangedError,
    SeqGapError,
    SeqOldError,
    VersionError,
)
from odma_service.learning import Learner
from odma_service.learning.drift import drift_between
from odma_service.learning.expected import (
    OVERFLOW_TOKEN_STEPS,
    RISKS,
    Seen,
    cheapest,
    cost_of,
    levels_at,
    seen_requests,
)
from odma_service.learning.recalibration import Lengths, limits_report, uncensored
from odma_service.learning.safety import LEAST_SHARE, MOST_SHARE, adapted_share
from odma_service.pool import Pool, PoolSpec
from odma_service.pool.geometry import Geometry
from odma_service.pool.policy import named
from odma_service.values import (
    Allocate,
    Batch,
    End,
    Free,
    Moves,
    Place,
    PlaneGroup,
    Reason,
    TenantShare,
)

EPOCH = 1
SPEC = PoolSpec(
    name="pool",
    open_id="open-1",
    geometry=Geometry((PlaneGroup(56, 1024),)),
    capacity_tokens=32_768,
    model_length_tokens=4096,
    moves=Moves.ANY,
    single_ordered_stream=True,
    copies_may_overlap=True,
    max_regions=128,
    max_ops=256,
    max_copies=256,
)


@pytest.fixture
def open_learner(tmp_path):
    """Return a function that opens a pool with a named policy and a learner around it."""
    pools = []

    def open_with(name):
        path = tmp_path / f"{len(pools)}.books"
        policy = named(name, SPEC.model_length_tokens, SPEC.capacity_tokens)
        pools.append(Pool.create(path, SPEC, EPOCH, "boot", policy))
        return Learner(pools[-1])

    yield open_with
    for pool in pools:
        pool.close()


def apply(learner, *ops):
    seq = learner.pool.last_seq + 1
    return learner.apply(EPOCH, Batch(seq, seq - 1, [], list(ops))).results


def complete(learner, outputs, end=End.FINISHED, prompt_tokens=16, **others):
    """Let requests with such outputs come and go, one batch each way."""
    for number, output in enumerate(outputs):
        op = Allocate(f"request {number}", prompt_tokens, **others)
        (place,) = apply(learner, op)
        apply(learner, Free(place.handle, end, output))


def predicted(learner, **others):
    """Return the quantiles that the books remember for a request."""
    (place,) = apply(learner, Allocate("asked", 16, **others))
    apply(learner, Free(place.handle, End.FINISHED, 100))
    return learner.pool._arena.completions()[-1].quantiles


# --- predictions ---


def test_an_answer_is_as_long_as_those_of_its_class(open_learner):
    learner = open_learner("odma")
    complete(learner, [100] * 40, request_class="chat")
    complete(learner, [1000] * 40, request_class="reasoning")
    assert 96 < predicted(learner, request_class="chat")[0] < 112
    assert 960 < predicted(learner, request_class="reasoning")[0] < 1040
    of_all = learner.pool.quantiles("never seen")
    assert predicted(learner, request_class="new") == of_all


def test_a_resubmitted_request_is_longer_than_what_it_generated(open_learner):
    learner = open_learner("odma")
    complete(learner, [100] * 40 + [1000] * 40)
    assert predicted(learner)[0] < 200 < predicted(learner, generated_tokens=200)[0]


def test_an_engines_guess_is_the_median(open_learner):
    learner = open_learner("odma")
    assert predicted(learner, predicted_output_tokens=50) == (50,) * 7
    complete(learner, [100] * 60 + [400] * 60)
    history = predicted(learner)
    guided = predicted(learner, predicted_output_tokens=50)
    assert guided[2] == pytest.approx(50)
    assert guided[6] / guided[2] == pytest.approx(history[6] / history[2], rel=0.2)


def test_without_a_history_nothing_is_predicted(open_learner):
    assert predicted(open_learner("odma")) is None


def test_only_policies_that_use_predictions_get_them(open_learner):
    for name, used in (("static", False), ("s3", True), ("odma", True), ("elastic", False)):
        learner = open_learner(name)
        complete(learner, [100] * 40)
        assert (predicted(learner) is not None) == used


def test_a_prediction_shortens_the_region(open_learner):
    learner = open_learner("odma")
    before = apply(learner, Allocate("early", 16))[0].length_tokens
    complete(learner, [100] * 40)
    after = apply(learner, Allocate("late", 16))[0].length_tokens
    assert (before, after) == (4096, 128)
    assert learner.allocate(EPOCH, Allocate("alone", 16)).length_tokens == 128


def test_a_batch_is_answered_again_whatever_was_learnt_since(open_learner):
    learner = open_learner("odma")
    complete(learner, [100] * 31)
    seq = learner.pool.last_seq
    batch = Batch(seq + 1, seq, [], [Allocate("a", 16)])
    first = learner.apply(EPOCH, batch)
    place = learner.pool.allocate(EPOCH, Allocate("b", 16, max_total_tokens=64))
    learner.pool.free(EPOCH, Free(place.handle, End.FINISHED, 2000))
    assert learner.apply(EPOCH, batch) == first._replace(replayed=True)
    with pytest.raises(SeqChangedError):
        learner.apply(EPOCH, batch._replace(ops=[Allocate("a", 17)]))
    with pytest.raises(SeqGapError):
        learner.apply(EPOCH, batch._replace(seq=batch.seq + 2))
    with pytest.raises(SeqOldError):
        learner.apply(EPOCH, batch._replace(seq=batch.seq - 1))
    with pytest.raises(EpochError):
        learner.apply(EPOCH + 1, batch)


def test_malformed_operations_are_for_the_pool_to_refuse(open_learner):
    learner = open_learner("odma")
    complete(learner, [100] * 40)
    for op, field in (
        (Allocate("a", 1, request_class="c" * 33), "request_class"),
        (Allocate("a", 1, request_class=[]), "request_class"),
        (Allocate("a", 1, predicted_output_tokens=0), "predicted_output_tokens"),
    ):
        (refusal,) = apply(learner, op)
        assert refusal.reason is Reason.INVALID
        assert refusal.field.startswith(field)
    for op, field in (
        (Allocate("a", 1, generated_tokens=-1), "generated_tokens"),
        (Allocate("a", 1, predicted_output_tokens=2**32), "predicted_output_tokens"),
    ):
        with pytest.raises(InvalidError) as caught:
            apply(learner, op)
        assert caught.value.field == f"ops[0].allocate.{field}"
    (place,) = apply(learner, Allocate("a", 1, predicted_output_tokens=2**32 - 1))
    assert type(place) is Place


# --- recalibration ---


def test_limits_move_to_where_the_lengths_are(open_learner):
    learner = open_learner("odma")
    complete(learner, [304] * 31 + [704] * 31)  # before it recalibrates itself
    version = learner.pool.policy().version
    report = learner.recalibrate(limits=3)
    assert report.after.limits_tokens == (320, 720, 4096) == learner.pool.policy().limits_tokens
    assert report.before.limits_tokens == named("odma", 4096, 32_768).limits_tokens
    assert report.after.waste_tokens < 16 < report.before.waste_tokens
    assert report.before.utilisation < 0.9 < 0.95 < report.after.utilisation <= 1
    assert (report.installed, report.policy_version) == (True, version + 1)
    assert report.completions == pytest.approx(62, rel=0.1)


def test_a_dry_run_changes_nothing(open_learner):
    learner = open_learner("odma")
    complete(learner, [200] * 50)
    policy = learner.pool.policy()
    dry = learner.recalibrate(dry_run=True)
    assert learner.pool.policy() == policy
    assert (dry.installed, dry.policy_version) == (False, policy.version)
    wet = learner.recalibrate()
    assert (wet.before, wet.after) == (dry.before, dry.after)


def test_the_same_limits_are_no_new_policy(open_learner):
    learner = open_learner("odma")
    complete(learner, [200] * 50)
    first, second = learner.recalibrate(), learner.recalibrate()
    assert second.installed
    assert second.policy_version == first.policy_version == learner.pool.policy().version


def test_nothing_is_recalibrated_without_buckets_or_experience(open_learner):
    with pytest.raises(NothingLearntError, match="no buckets"):
        open_learner("elastic").recalibrate()
    learner = open_learner("odma")
    complete(learner, [200] * 31)
    with pytest.raises(NothingLearntError, match="31"):
        learner.recalibrate()
    complete(learner, [200])
    learner.recalibrate()


def test_recalibration_expects_a_version_and_few_limits(open_learner):
    learner = open_learner("odma")
    complete(learner, [200] * 40)
    version = learner.pool.policy().version
    for dry_run in (True, False):
        with pytest.raises(VersionError):
            learner.recalibrate(dry_run, version + 1)
    for limits in (-1, 17):
        with pytest.raises(InvalidError, match="limits"):
            learner.recalibrate(limits=limits)
    assert learner.recalibrate(False, version, 16).policy_version == version + 1


def test_the_last_limit_holds_the_longest_request_whatever_was_seen(open_learner):
    learner = open_learner("odma")
    complete(learner, [10] * 40)
    for limits in (1, 2, 16):
        assert learner.recalibrate(limits=limits).after.limits_tokens[-1] == 4096


WEIGHTS = st.lists(st.integers(0, 5), min_size=6, max_size=6)


@given(WEIGHTS, WEIGHTS)
def test_stopped_requests_go_to_the_longer_lengths(finished, censored):
    finished, censored = np.array(finished, float), np.array(censored, float)
    weights = uncensored(finished, censored)
    assert weights.sum() == pytest.approx((finished + censored).sum())
    assert np.all(weights >= 0)
    longer = np.cumsum(weights[::-1])[::-1]
    assert np.all(longer >= np.cumsum((finished + censored)[::-1])[::-1] - 1e-9)


def test_stopped_requests_are_spread_as_the_finished_ones_lie():
    finished, censored = np.array([2.0, 0, 1, 3, 0]), np.array([0, 4.0, 0, 0, 0])
    assert uncensored(finished, censored) == pytest.approx([2, 0, 2, 6, 0])
    assert uncensored(np.zeros(3), np.array([1.0, 1, 1])) == pytest.approx([0, 0, 3])


def test_waste_is_what_lies_beyond_a_request():
    policy = replace(named("odma", 4096, 32_768), limits_tokens=(100, 200), step_tokens=64)
    lengths = Lengths(np.array([50, 200, 250], np.uint32), np.array([2.0, 1.0, 1.0]))
    report = limits_report(policy, lengths)
    assert report.waste_tokens == pytest.approx((2 * 50 + 0 + 0) / 4)
    assert report.utilisation == pytest.approx((100 + 200 + 250) / (200 + 200 + 250))


# --- expected cost ---


def test_no_risk_is_cheaper_than_the_one_that_is_chosen(open_learner):
    learner = open_learner("odma")
    complete(learner, np.random.default_rng(5).integers(100, 2_000, 60).tolist())
    best = cheapest(learner.pool)
    seen = seen_requests(learner.pool, 4096)
    upper = learner.pool.bins()
    costs = {
        risk: cost_of(best.policy, levels_at(risk, seen, upper[upper <= 4096])) for risk in RISKS
    }
    assert best.policy.overflow_risk == min(costs, key=lambda risk: costs[risk])
    assert best.gain > 0


def test_a_risk_that_somebody_set_stays(open_learner):
    learner = open_learner("odma")
    learner.pool.set_policy(learner.pool.policy().with_changes(overflow_risk=0.05))
    complete(learner, [100, 900] * 32)
    assert learner.pool.policy().overflow_risk == 0.05
    assert learner.pool.policy().version > 2, "limits were found all the same"


@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 90), st.integers(1, 200)),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from((0.1, 0.5, 0.9)),
)
def test_the_cost_of_limits_is_what_a_walk_through_them_costs(requests, risk):
    prompts, outputs, guesses = (np.array(column, float) for column in zip(*requests, strict=True))
    upper = np.arange(1, 301, dtype=np.uint32)
    totals = np.minimum(prompts + outputs, 300)
    seen = Seen(prompts, totals, np.ones(len(prompts)), np.tile(guesses[:, None], 7))
    levels = levels_at(risk, seen, upper)
    limits = (40, 100, 180, 300)
    policy = replace(named("odma", 4096, 32_768), limits_tokens=limits)
    walked = 0.0
    for prompt, total, guess in zip(prompts, totals, guesses, strict=True):
        start = min(max(prompt + guess, prompt + 1), 300)
        for written in range(int(prompt) + 1, int(total) + 1):
            walked += min(limit for limit in limits if limit >= max(written, start))
        passed = [limit for limit in limits[:-1] if start <= limit < total]
        walked += OVERFLOW_TOKEN_STEPS * sum(passed)
    assert cost_of(policy, levels) == pytest.approx(walked, rel=1e-9)


# --- the safety share ---


@given(st.floats(0, 0.9), st.integers(0, 1000), st.integers(0, 1000))
def test_a_share_stays_within_its_bounds_or_as_it_was_decided(share, preempted, completed):
    adapted = adapted_share(share, preempted, completed)
    if LEAST_SHARE <= share <= MOST_SHARE:
        assert LEAST_SHARE <= adapted <= MOST_SHARE
    else:
        assert adapted == share


def test_preemptions_raise_the_share_and_calm_lowers_it():
    assert adapted_share(0.05, 10, 64) > 0.05
    assert adapted_share(0.05, 0, 64) < 0.05
    assert adapted_share(0.05, 4, 64) == 0.05


def test_elastic_keeps_more_back_after_preemptions(open_learner):
    learner = open_learner("elastic")
    learner.pool.set_policy(learner.pool.policy().with_changes(safety_share=0.06))
    complete(learner, [10] * 54)
    complete(learner, [10] * 10, End.PREEMPTED)
    assert learner.pool.policy().safety_share == pytest.approx(0.072)
    complete(learner, [10] * 64)
    assert learner.pool.policy().safety_share == pytest.approx(0.072 * 0.93)
    complete(learner, [10] * 64)
    assert learner.pool.policy().safety_share == pytest.approx(0.072 * 0.93)  # within half a point
    complete(learner, [10] * 64)
    assert learner.pool.policy().safety_share == pytest.approx(0.072 * 0.93**3)


def test_no_other_policy_adapts_its_share(open_learner):
    learner = open_learner("odma")
    share = learner.pool.policy().safety_share
    complete(learner, [10] * 64, End.PREEMPTED)
    assert learner.pool.policy().safety_share == share


def test_a_share_that_somebody_set_is_where_it_goes_on_from(open_learner):
    learner = open_learner("elastic")
    complete(learner, [10] * 64 * 2)
    learner.pool.set_policy(learner.pool.policy().with_changes(safety_share=0.08))
    complete(learner, [10] * 64, End.PREEMPTED)
    assert learner.pool.policy().safety_share == pytest.approx(0.096)
    learner.pool.set_policy(learner.pool.policy().with_changes(safety_share=0))
    complete(learner, [10] * 64, End.PREEMPTED)
    assert learner.pool.policy().safety_share == 0


# --- drift ---


def test_chance_is_not_drift():
    random = np.random.default_rng(4)
    bins = np.arange(101)
    same = [np.histogram(random.normal(50, 9, 400), bins)[0].astype(float) for _ in range(2)]
    assert not drift_between(*same).found
    other = np.histogram(random.normal(60, 9, 400), bins)[0].astype(float)
    assert drift_between(same[0], other).found


def test_odma_finds_its_limits_when_lengths_are_known_and_again_when_they_drift(open_learner):
    learner = open_learner("odma")
    first = learner.pool.policy().limits_tokens
    complete(learner, [30] * 64)
    second = learner.pool.policy().limits_tokens
    assert second != first
    version = learner.pool.policy().version
    complete(learner, [30] * 640)
    assert learner.pool.policy().version == version, "nothing drifted"
    complete(learner, [300] * 640)
    assert learner.pool.policy().limits_tokens != second


def test_the_safety_share_leaves_guarantees_alone(open_learner):
    learner = open_learner("elastic")
    tenants = [TenantShare("sure", 0.94)]
    learner.set_policy(learner.pool.policy().with_changes(safety_share=0.055, tenants=tenants))
    complete(learner, [16] * 128, end=End.PREEMPTED)
    assert learner.pool.policy().safety_share == pytest.approx(0.06)
