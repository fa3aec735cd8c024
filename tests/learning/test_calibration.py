"""History and calibration: what the last completions say, while they come late."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.stream.stream import Kind, phase_of, serve_stream
from odma_service._native.records import COMPLETION
from odma_service.learning import Learner, Source
from odma_service.learning.calibration import calibrate, coverage
from odma_service.learning.foresight import longer_than
from odma_service.learning.history import Evidence, history_of, lately
from odma_service.learning.predictor import History
from odma_service.pool import Pool, PoolSpec
from odma_service.pool.geometry import Geometry
from odma_service.pool.policy import named
from odma_service.values import Allocate, Batch, End, Free, Moves, PlaneGroup

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
)
SPREAD = (0.5, 0.7, 1.0, 1.4, 2.0, 2.4, 3.5)
"""A model's quantiles over its median."""


class Model:
    """A real predictor, if a simple one: its median is a function of the prompt's length."""

    version = "by-prompt"

    def __init__(self, median):
        self.median = median
        self.asked = 0

    def predict(self, prompts):
        self.asked += len(prompts)
        return [
            tuple(part * self.median(prompt.prompt_tokens) for part in SPREAD) for prompt in prompts
        ]


def entries(output_tokens, *, began=None, until=None, raw=None, censored=False, quantiles=None):
    """Return completions, one begun and ended after the other unless said otherwise."""
    rows = np.zeros(len(output_tokens), COMPLETION)
    rows["output_tokens"] = output_tokens
    rows["issue"] = np.arange(1, len(rows) + 1) if began is None else began
    rows["until"] = rows["issue"] if until is None else until
    rows["quantiles"] = -1 if quantiles is None else quantiles
    rows["raw"] = 0 if raw is None else raw
    rows["censored"] = censored
    rows["overflow_risk"] = 0.05
    return rows


def evidence(ring, running=None):
    return Evidence(ring, entries([]) if running is None else running, len(ring))


def calibrated(ring, running=None):
    seen = evidence(ring, running)
    return calibrate(seen, lately(seen))


# --- history ---


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=256))
def test_without_delay_history_is_that_of_the_last_100_completions(outputs):
    history = history_of(lately(evidence(entries(outputs))))
    plain = History.of(outputs)
    assert history.count == plain.count
    assert history.mean == pytest.approx(plain.mean)
    assert history.sd == pytest.approx(plain.sd, abs=1e-6)
    assert history.quantiles == pytest.approx(plain.quantiles)


def test_without_completions_there_is_no_history():
    assert lately(evidence(entries([]))) is None
    assert history_of(None) == History()


def late(lengths, now, tokens_per_request):
    """Return what is known at request `now` if answers grow at that speed."""
    began = np.arange(1, now + 1)
    lengths = np.array(lengths[:now], float)
    ends = began + lengths / tokens_per_request
    done = np.flatnonzero(ends <= now)
    done = done[np.argsort(ends[done], kind="stable")][-256:]
    runs = np.flatnonzero(ends > now)
    ring = entries(lengths[done], began=began[done], until=np.ceil(ends[done]))
    running = entries((now - began[runs]) * tokens_per_request, began=began[runs], censored=True)
    running["until"] = now
    return evidence(ring, running)


def test_lengths_are_right_though_the_long_ones_end_last():
    lengths = np.exp(np.random.default_rng(1).normal(6, 1, 2000))
    seen = late(lengths, 200, 10)  # the mean answer takes 66 requests
    plain = History.of(seen.ring["output_tokens"].tolist())
    history = history_of(lately(seen))
    assert plain.mean < 5.8
    assert abs(history.mean - 6) < 0.15
    assert abs(history_of(lately(late(lengths, 1500, 10))).mean - 6) < 0.15


def test_a_shift_to_longer_answers_is_seen_before_the_first_has_ended():
    random = np.random.default_rng(2)
    lengths = np.concatenate([random.uniform(30, 90, 300), random.uniform(3000, 4000, 300)])
    seen = late(lengths, 400, 20)  # the oldest of the new kind is at 2,000 tokens
    assert seen.ring["output_tokens"].max() < 100
    now = lately(seen)
    assert now.unseen > 0.5
    assert history_of(now).quantiles[5] > np.log(2000)


# --- correction ---


def predicted(actual, bias=1.0, spread=0.4, seed=3):
    """Return raw predictions of lengths that are right but for `bias` and a known spread."""
    noise = np.random.default_rng(seed).normal(0, spread, len(actual))
    z = np.array([-1.2816, -0.6745, 0, 0.6745, 1.2816, 1.6449, 2.3263])
    return (np.array(actual) * bias)[:, None] * np.exp(noise[:, None] + spread * z)


def some_lengths(count=256, sigma=1.0, seed=4):
    return np.exp(np.random.default_rng(seed).normal(5, sigma, count)).astype(int) + 1


@pytest.mark.parametrize("bias", [0.3, 1.0, 3.0])
def test_a_biased_model_is_put_right(bias):
    actual = some_lengths()
    calibration = calibrated(entries(actual, raw=predicted(actual, bias)))
    assert calibration.source is Source.MODEL
    new = some_lengths(2000, seed=5)
    raw = predicted(new, bias, seed=6)
    corrected = np.array([calibration.corrected(tuple(row)) for row in raw.tolist()])
    for level, column in ((0.5, 2), (0.9, 4), (0.95, 5)):
        assert abs((new <= corrected[:, column]).mean() - level) < 0.05
    assert (np.diff(corrected, axis=1) >= 0).all()


def test_few_completions_correct_nothing():
    actual = some_lengths(31)
    calibration = calibrated(entries(actual, raw=predicted(actual, 0.3)))
    assert calibration.corrected((1, 2, 3, 4, 5, 6, 7)) == pytest.approx((1, 2, 3, 4, 5, 6, 7))


def test_requests_stopped_at_their_limit_are_longer_than_that():
    actual = some_lengths()
    limit = int(np.quantile(actual, 0.8))
    raw = predicted(actual)
    stopped = np.minimum(actual, limit)
    taken_at_its_word = calibrated(entries(stopped, raw=raw)).corrections
    told = calibrated(entries(stopped, raw=raw, censored=actual > limit)).corrections
    truth = calibrated(entries(actual, raw=raw)).corrections
    assert (told >= taken_at_its_word - 1e-9).all()
    assert abs(told[3] - truth[3]) < 0.1
    assert told[5] > taken_at_its_word[5]


def test_a_correction_leads_to_no_length_beyond_those_known():
    actual = some_lengths()
    calibration = calibrated(entries(actual, raw=predicted(actual, 0.01)))
    assert max(calibration.corrected((1e3, 1e3, 1e3, 1e3, 1e3, 1e3, 1e3))) <= actual.max() + 1
    assert calibration.corrected((9e4,) * 7)[6] == pytest.approx(9e4)  # the model's own word


def test_a_model_that_knows_less_than_the_lengths_alone_is_left():
    actual = some_lengths(sigma=0.2)
    guesses = np.random.default_rng(7).permutation(some_lengths(sigma=1.5))
    calibration = calibrated(entries(actual, raw=predicted(guesses)))
    assert calibration.source is Source.WINDOW
    quantiles = calibration.corrected((1, 1, 1, 1, 1, 1, 1))
    assert quantiles[5] == pytest.approx(np.quantile(actual[-100:], 0.95), rel=0.1)


def test_while_longer_answers_are_unseen_nothing_is_narrowed_and_the_model_kept():
    actual = some_lengths(sigma=0.2)
    ring = entries(actual, raw=predicted(actual, 4.0))
    assert (calibrated(ring).corrections < 0).all()
    running = entries(np.full(64, 5000), began=np.arange(257, 321), until=321, censored=True)
    calibration = calibrated(ring, running)
    assert (calibration.corrections >= 0).all()
    assert calibration.source is Source.MODEL


def test_an_overflow_counts_when_it_happens_and_a_short_run_not_yet():
    grant = np.tile(np.array([10, 20, 30, 40, 50, 60, 70.0]), (100, 1))
    ring = entries(np.full(100, 60), quantiles=grant)
    assert coverage(evidence(ring))[:2] == (100, 100)
    running = entries([59, 60, 61, 500], quantiles=grant[:4], censored=True)
    assert coverage(evidence(ring, running))[:2] == (100, 102)
    assert coverage(evidence(ring)).target == pytest.approx(0.95)


def test_a_file_may_hold_anything():
    ring = entries(some_lengths(64), raw=np.nan, quantiles=np.inf)
    assert calibrated(ring).corrected((1.0,) * 7) == pytest.approx((1.0,) * 7)
    assert coverage(evidence(ring)).known == 0


@given(
    st.lists(st.floats(1, 5000), min_size=7, max_size=7).map(sorted).map(tuple),
    st.integers(0, 10_000),
)
def test_what_has_been_generated_is_a_lower_bound(quantiles, tokens):
    longer = longer_than(quantiles, tokens)
    assert list(longer) == sorted(longer)
    assert longer[0] >= tokens - 1e-6 * max(tokens, 1)
    assert all(new >= old * (1 - 1e-9) for new, old in zip(longer, quantiles, strict=True))


# --- a stream ---


def kind(name, median, count, seed):
    """Return requests whose prompt is a tenth of their answer, but for noise."""
    random = np.random.default_rng(seed)
    outputs = np.exp(random.normal(np.log(median), 0.6, count)).astype(int) + 1
    prompts = np.maximum(outputs * np.exp(random.normal(0, 0.3, count)) / 10, 1).astype(int)
    return Kind(name, [None] * count, prompts.tolist(), outputs.tolist())


@pytest.mark.parametrize("delay", [0, 64])
def test_a_shift_neither_uncovers_nor_winds_up(delay, tmp_path):
    kinds = [kind("short", 60, 500, 1), kind("long", 900, 500, 2), kind("short", 60, 500, 3)]
    model = Model(lambda prompt: 3.0 * prompt)  # a third of what it should say
    served = serve_stream(kinds, delay, model, tmp_path)
    for number in range(3):
        phase = phase_of(served, number, "", warmup=200)
        assert 0.88 <= phase.coverage <= 0.985, phase
        assert phase.reserved_over_actual < 3.5, phase
        assert phase.recovery_requests <= 60, phase


def test_lengths_alone_wind_up_no_more_than_a_model_does(tmp_path):
    kinds = [kind("long", 900, 500, 1), kind("short", 60, 500, 2)]
    served = serve_stream(kinds, 64, Model(lambda prompt: 100), tmp_path)
    phase = phase_of(served, 1, "", warmup=0)
    assert phase.coverage >= 0.93
    assert phase.reserved_over_actual < 25  # the old lengths are 15 times the new ones
    assert served.reserved[-300:].sum() / served.actual[-300:].sum() < 4


# --- in a learner ---


@pytest.fixture
def open_learner(tmp_path):
    """Return a function that opens a pool with a policy and a learner with a model."""
    pools = []

    def open_with(model, policy="odma"):
        record = named(policy, SPEC.model_length_tokens, SPEC.capacity_tokens)
        pools.append(Pool.create(tmp_path / f"{len(pools)}.books", SPEC, EPOCH, "boot", record))
        return Learner(pools[-1], model=lambda: model)

    yield open_with
    for pool in pools:
        pool.close()


def serve(learner, count, output=100, prompt=20, **others):
    for number in range(count):
        place = learner.allocate(EPOCH, Allocate(f"r{number}", prompt, **others))
        learner.pool.free(EPOCH, Free(place.handle, End.FINISHED, output))


def test_a_model_is_asked_only_where_the_policy_needs_it(open_learner):
    for policy, used in (("static", False), ("elastic", False), ("s3", True), ("odma", True)):
        model = Model(lambda prompt: 100)
        learner = open_learner(model, policy)
        serve(learner, 3)
        batch = Batch(1, 0, [], [Allocate("a", 20), Allocate("b", 21)])
        learner.apply(EPOCH, batch)
        assert model.asked == (5 if used else 0)
        assert (learner.asks(batch.ops) is not None) == used


def test_a_batch_that_was_answered_asks_no_model(open_learner):
    model = Model(lambda prompt: 100)
    learner = open_learner(model)
    batch = Batch(1, 0, [], [Allocate("a", 20, text="hello")])
    first = learner.apply(EPOCH, batch)
    asked = model.asked
    model.median = lambda prompt: 3000
    assert learner.asks(batch.ops, batch.seq) is None
    assert learner.apply(EPOCH, batch) == first._replace(replayed=True)
    assert model.asked == asked


def test_a_request_that_is_asked_for_again_costs_the_model_nothing(open_learner):
    model, other = Model(lambda prompt: 100), Model(lambda prompt: 3000)
    learner = open_learner(model)
    serve(learner, 40)
    waiting = [Allocate("a", 20, text="hello"), Allocate("b", 20, text="good-bye")]

    def asked(*ops):
        before = model.asked
        answers = learner.asks(ops).answers()
        return model.asked - before, answers

    first, answers = asked(*waiting)
    assert first == 2
    assert asked(*reversed(waiting)) == (0, answers[::-1])
    assert asked(waiting[0])[0] == 0
    assert asked(*waiting) == (1, answers)  # only the last question is remembered
    assert asked(waiting[0]._replace(prompt_tokens=30))[0] == 1
    serve(learner, 5, output=200)  # another history
    assert asked(waiting[0])[0] == 1
    learner._model = lambda: other
    learner.asks(waiting).answers()
    assert other.asked == 2


def test_a_model_alone_is_noted_but_not_trusted(open_learner):
    learner = open_learner(Model(lambda prompt: 100))
    place = learner.allocate(EPOCH, Allocate("first", 20))
    assert place.length_tokens == 4096  # its maximum
    learner.pool.free(EPOCH, Free(place.handle, End.FINISHED, 100))
    ring, _, _ = learner.pool.shown(None)
    assert ring["raw"][0] == pytest.approx([part * 100 for part in SPREAD])
    assert ring["quantiles"][0][0] < 0
    serve(learner, 31)
    assert learner.allocate(EPOCH, Allocate("trusted", 20)).length_tokens < 512


def test_a_class_with_few_completions_uses_the_pools(open_learner):
    learner = open_learner(Model(lambda prompt: 100))
    serve(learner, 40, output=100, request_class="chat")
    serve(learner, 31, output=800, request_class="new")
    chat, mixed = (learner.question([Allocate("a", 20, request_class=c)]) for c in ("chat", "new"))
    assert chat.asked[0].prompt.history.sd == pytest.approx(0, abs=1e-6)
    assert mixed.asked[0].prompt.history.sd > 0.5
    serve(learner, 1, output=800, request_class="new")
    own = learner.question([Allocate("a", 20, request_class="new")])
    assert own.asked[0].prompt.history.mean == pytest.approx(np.log(801))


def test_coverage_says_what_a_class_rests_on(open_learner):
    learner = open_learner(Model(lambda prompt: 100))
    assert learner.coverage("chat") == ((0, 0, 0.0), Source.NOTHING)
    serve(learner, 80, output=100, request_class="chat")
    fares = learner.coverage("chat")
    assert fares.coverage.known == 80 - 32
    assert fares.coverage.covered == fares.coverage.known
    risk = learner.pool.policy().overflow_risk
    assert fares.coverage.target == pytest.approx(1 - risk)
    assert fares.source in (Source.MODEL, Source.WINDOW)


def test_what_was_learnt_is_the_same_for_another_learner(open_learner):
    model = Model(lambda prompt: 40)
    learner = open_learner(model)
    serve(learner, 100, output=300)
    again = Learner(learner.pool, model=lambda: model)
    ops = [Allocate("a", 20), Allocate("b", 20, 50), Allocate("c", 20, predicted_output_tokens=9)]
    answers = learner.question(ops).answers()
    assert again.question(ops).answers() == answers
    assert answers[0].quantiles[2] == pytest.approx(300, rel=0.05)
    assert answers[1].quantiles[0] >= 50
    assert answers[2].quantiles[2] == pytest.approx(9)
    assert answers[2].source is Source.GUESS


def test_the_command_serves_a_stream_and_leaves_out_its_warm_up(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    files = [str(tmp_path / f"{name}.parquet") for name in ("short", "long")]
    for file, tokens in zip(files, (40, 400), strict=True):
        column = {"prompt_tokens": [20] * 150, "output_tokens": [tokens] * 150}
        column |= {"prompt": [f"how long, {i}?" for i in range(150)], "model": ["m"] * 150}
        parquet.write_table(pyarrow.table(column), file)
    command = [sys.executable, "-m", "odma_service", "predictor", "stream", *files]
    command += ["--delay", "0", "--seeds", "1", "--warmup", "160", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    short, long = json.loads(done.stdout)["runs"][0]["phases"]
    assert (short["requests"], short["coverage"]) == (0, None)
    assert long["requests"] == 140
    assert long["coverage"] > 0.9
    assert long["recovery_requests"] == 0
