"""The binding: what goes into C and what comes out, in tokens."""

from __future__ import annotations

import os
import resource
import stat
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odma_service._native import (
    CLASS_OTHER,
    CLASS_POOL,
    Arena,
    ArenaGeometry,
    EngineRecord,
    PolicyRecord,
    optimal_limits,
)
from odma_service._native._odma import ffi, lib
from odma_service._native.operations import RULES
from odma_service.errors import (
    BooksCorruptError,
    BooksError,
    BooksForeignError,
    BooksLockedError,
    BooksMismatchError,
    EpochError,
    InvalidError,
    PoolLimitError,
    PoolNotFoundError,
    SeqChangedError,
    SeqGapError,
    SeqOldError,
    VersionError,
)
from odma_service.values import (
    Allocate,
    Batch,
    End,
    Extend,
    Free,
    Freed,
    Moves,
    Overflow,
    Place,
    Prediction,
    Reason,
    Refusal,
    Start,
    Text,
    Trim,
    Used,
)

EPOCH = 7
GEOMETRY = ArenaGeometry(
    blocks=64,
    block_tokens=16,
    max_regions=16,
    max_ops=32,
    max_copies=32,
    model_length_tokens=512,
    digest=2**64 - 1,
)
ENGINE = EngineRecord(Moves.ANY, True, True, 56, 1e-7, 3.7e-7)
STEP = PolicyRecord("elastic", Start.STEP, Overflow.COMPACT, step_tokens=16)
FLAT = (10.0,) * 7


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pool.books"


@pytest.fixture
def arena(path):
    with Arena.create(path, GEOMETRY) as arena:
        arena.set_policy(STEP)
        arena.open_epoch(EPOCH, ENGINE, "boot", b"a description")
        yield arena


def batch(seq, *ops, used=(), **others):
    return Batch(seq, others.pop("completed_seq", 0), list(used), list(ops), **others)


def apply(arena, *ops, **others):
    """Do the operations as the next batch and return their results."""
    return arena.apply(EPOCH, batch(arena.report().seq + 1, *ops, **others)).results


def complete(arena, outputs, end=End.FINISHED, **others):
    """Let requests with such outputs come and go."""
    for output in outputs:
        place = arena.unary(EPOCH, Allocate("r", 1, **others))
        arena.unary(EPOCH, Free(place.handle, end, output))


# --- results ---


def test_lengths_and_places_are_tokens(arena):
    first, second = apply(arena, Allocate("a", 17), Allocate("b", 1))
    assert (first.start_token, first.length_tokens) == (0, 48)
    assert (second.start_token, second.length_tokens) == (48, 32)
    report = arena.report()
    assert report.reserved_tokens == 80
    assert report.free_tokens == report.largest_run_tokens == 64 * 16 - 80


def test_each_kind_of_operation_has_its_result(arena):
    (place,) = apply(arena, Allocate("a", 30))
    extended, trimmed, freed, again = apply(
        arena,
        Extend(place.handle, 100),
        Trim(place.handle, 64),
        Free(place.handle, End.FINISHED, 5),
        Free(place.handle, End.FINISHED, 5),
        used=[Used(place.handle, 30)],
    )
    assert type(extended) is type(trimmed) is Place
    assert freed == Freed(already_free=False)
    assert again == Freed(already_free=True)


def test_a_refusal_tells_what_there_is(arena):
    apply(arena, *(Allocate(f"r{i}", 241, max_total_tokens=256) for i in range(4)))
    (refusal,) = apply(arena, Allocate("late", 1))
    assert refusal == Refusal(Reason.NO_SPACE)
    (place,) = apply(arena, Allocate("r0", 241, max_total_tokens=256))
    (refusal,) = apply(arena, Extend(place.handle, 257))
    assert refusal.reason is Reason.INVALID
    assert refusal.field == "least_tokens: 1 to the request's maximum, rounded up to a block"


def test_copies_and_moved_regions_come_in_tokens(arena):
    a, b = apply(arena, Allocate("a", 496), Allocate("b", 496))
    used = [Used(a.handle, 100), Used(b.handle, 90)]
    trimmed = apply(arena, Trim(a.handle, 112), Trim(b.handle, 96), used=used)
    assert trimmed[1].start_token == 512
    answer = arena.apply(EPOCH, batch(3, Allocate("d", 496), Allocate("e", 250), used=used))
    moved = {place.handle: place for place in answer.moved}
    for copy in answer.copies:
        assert copy.tokens == {a.handle: 100, b.handle: 90}[copy.handle]
        assert moved[copy.handle].start_token == copy.to_token
        assert copy.overlaps == (abs(copy.from_token - copy.to_token) < copy.tokens)
    assert answer.copies
    assert type(answer.results[1]) is Place
    arena.check()


def test_every_rule_of_the_header_has_a_sentence():
    numbers = set(ffi.typeof("odma_rule").elements) - {lib.ODMA_RULE_NONE}
    assert set(RULES) == numbers


def test_every_reason_of_the_header_has_a_value():
    numbers = set(ffi.typeof("odma_reason").elements) - {lib.ODMA_REASON_NONE}
    assert {int(reason) for reason in Reason} == numbers


# --- bad values inside one operation ---


@pytest.mark.parametrize(
    ("op", "field"),
    [
        (Allocate("", 1), "request_id"),
        (Allocate("é" * 33, 1), "request_id"),
        (Allocate("a\0b", 1), "request_id"),
        (Allocate("\ud800", 1), "request_id"),
        (Allocate(5, 1), "request_id"),
        (Allocate("a", 1, request_class="c" * 33), "request_class"),
        (Allocate("a", 1, request_class="\0"), "request_class"),
        (Allocate("a", 1, tenant="t" * 33), "tenant"),
        (Allocate("a", 1, text="x" * 16_385), "text"),
        (Allocate("a", 1, text="é" * 8_193), "text"),
        (Allocate("a", 1, text=Text(b"x" * 16_385)), "text"),
        (Allocate("a", 1, text="\ud800"), "text"),
        (Allocate("a", 1, text=b"x"), "text"),
        (Allocate("a", 1, predicted_output_tokens=0), "predicted_output_tokens"),
        (Allocate("a", 0), "prompt_tokens"),
        (Allocate("a", 2**32 - 1), "prompt_tokens"),
        (Allocate("a", 500, 13), "prompt_tokens"),
        (Allocate("a", 1, max_total_tokens=0), "max_total_tokens"),
        (Allocate("a", 1, max_total_tokens=64 * 16 + 1), "max_total_tokens"),
        (Allocate("a", 1, max_total_tokens=2**32 - 1), "max_total_tokens"),
        (Allocate("a", 1, overflow_risk=-1e-9), "overflow_risk"),
        (Allocate("a", 1, overflow_risk=-0.5), "overflow_risk"),
        (Allocate("a", 1, overflow_risk=1.5), "overflow_risk"),
        (Allocate("a", 1, overflow_risk=float("nan")), "overflow_risk"),
        (Allocate("a", 1, overflow_risk=float("-inf")), "overflow_risk"),
        (Extend(0, 1), "handle"),
        (Trim(2**64 - 1, 1), "handle"),
        (Free(99, End.FINISHED), "handle"),
        (Free(99, 0), "end"),
    ],
)
def test_a_bad_value_is_the_result_of_its_operation_alone(arena, op, field):
    bad, good = apply(arena, op, Allocate("good", 1), pass_refused=True)
    assert bad.field.startswith(f"{field}: ")
    assert bad.reason in {Reason.INVALID, Reason.NOT_FOUND}
    assert type(good) is Place


def test_what_fits_exactly_is_taken(arena):
    op = Allocate("é" * 32, 1, request_class="c" * 32, tenant="t" * 32, text="x" * 16_384)
    assert type(apply(arena, op)[0]) is Place
    assert arena.regions()[0].request_id == "é" * 32
    assert arena.class_names() == ["c" * 32]


def test_operations_that_c_is_not_shown_still_make_another_body(arena):
    arena.apply(EPOCH, batch(1, Allocate("x" * 65, 1)))
    assert arena.apply(EPOCH, batch(1, Allocate("x" * 65, 1))).replayed
    with pytest.raises(SeqChangedError):
        arena.apply(EPOCH, batch(1, Allocate("x" * 66, 1)))


# --- bad batches ---


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (batch(1, used=[Used(1, 1), Used(1, 2**32)]), "used[1].used_tokens"),
        (batch(1, used=[Used(-1, 1)]), "used[0].handle"),
        (batch(1, used=[Used(1, 1.5)]), "used[0].used_tokens"),
        (batch(1, Free(1, End.FINISHED), Extend(1, -1)), "ops[1].extend.least_tokens"),
        (batch(1, Extend(2**64, 1)), "ops[0].extend.handle"),
        (batch(1, Trim(1, None)), "ops[0].trim.to_tokens"),
        (batch(1, Free(1, End.FINISHED, 2**32)), "ops[0].free.output_tokens"),
        (batch(1, Allocate("a", 2**32)), "ops[0].allocate.prompt_tokens"),
        (batch(1, Allocate("a", 1, max_total_tokens=2**33)), "ops[0].allocate.max_total_tokens"),
        (batch(1, Allocate("a", 1, overflow_risk="x")), "ops[0].allocate.overflow_risk"),
        (batch(1, Allocate("a", 1, predicted_output_tokens=-1)),
         "ops[0].allocate.predicted_output_tokens"),
        (batch(1, Allocate("x" * 65, -1)), "ops[0].allocate.prompt_tokens"),
        (batch(1, None), "ops[0]"),
        (batch(2**64), "seq"),
        (batch(1, completed_seq=-1), "completed_seq"),
        (batch(1, completed_seq=1), "completed_seq"),
        (batch(1, max_copy_tokens=2**32), "max_copy_tokens"),
        (batch(1, used=[Used(1, 1)] * 17), "used"),
        (batch(1, *[Free(1, End.ABORTED)] * 33), "ops"),
        (batch(1, used=[Used(99, 1)]), "used[0].handle"),
    ],
)  # fmt: skip
def test_a_bad_batch_is_an_error_and_changes_nothing(arena, wrong, field):
    before = arena.report()
    with pytest.raises(InvalidError) as caught:
        arena.apply(EPOCH, wrong)
    assert caught.value.field == field
    assert arena.report() == before
    assert type(apply(arena, Allocate("a", 1))[0]) is Place


def test_used_entries_are_named_by_their_place_in_the_list(arena):
    a, b = apply(arena, Allocate("a", 1), Allocate("b", 1))
    for used, field in (
        ([Used(a.handle, 1), Used(b.handle, 33)], "used[1].used_tokens"),
        ([Used(a.handle, 1), Used(a.handle, 1)], "used[1].handle"),
    ):
        with pytest.raises(InvalidError) as caught:
            apply(arena, used=used)
        assert caught.value.field == field


def test_predictions_are_one_for_each_operation(arena):
    for predictions in ([], [FLAT, FLAT], [(1.0,) * 8], ["much"]):
        with pytest.raises(InvalidError, match="predictions"):
            arena.apply(EPOCH, batch(1, Allocate("a", 1)), predictions)


def test_a_prediction_that_falls_is_refused(arena):
    falling = (5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0)
    (refusal,) = arena.apply(EPOCH, batch(1, Allocate("a", 1)), [falling]).results
    assert refusal.field == "prediction: finite, at least 0, ascending"


def test_predictions_are_no_part_of_the_body(arena):
    one = batch(1, Allocate("a", 1, text="Wie lang?"))
    first = arena.apply(EPOCH, one, [FLAT])
    again = arena.apply(EPOCH, one, [None])
    assert again == first._replace(replayed=True)
    assert arena.replay(EPOCH, one) == again


def test_an_operation_that_is_shown_says_nothing_of_its_text():
    op = Allocate("a", 1, text=Text.of("a secret"))
    assert "secret" not in repr(op)
    assert op == Allocate("a", 1, text=Text(b"a secret"))
    assert op != Allocate("a", 1, text=Text(b"a secre7"))


@pytest.mark.parametrize("request_id", ["a", "a\0b"])
def test_a_text_that_was_encoded_before_makes_the_same_body(arena, request_id):
    one = batch(1, Allocate(request_id, 1, text="Wie groß?"))
    first = arena.apply(EPOCH, one)
    again = batch(1, Allocate(request_id, 1, text=Text.of("Wie groß?")))
    assert arena.replay(EPOCH, again) == first._replace(replayed=True)
    for text in ("Wie groß!", Text.of("Wie groß!")):
        with pytest.raises(SeqChangedError):
            arena.replay(EPOCH, batch(1, Allocate(request_id, 1, text=text)))


@pytest.mark.parametrize(
    "other",
    [
        Allocate("b", 1),
        Allocate("a", 2),
        Allocate("a", 1, text=""),
        Allocate("a", 1, text="x"),
        Allocate("a", 1, tenant="t"),
        Allocate("a", 1, request_class="t"),
        Allocate("a", 1, overflow_risk=0.5),
        Allocate("a", 1, predicted_output_tokens=3),
        Allocate("a", 1, max_total_tokens=512),
        Free(1, End.FINISHED),
    ],
)
def test_the_body_is_all_that_was_sent(arena, other):
    arena.apply(EPOCH, batch(1, Allocate("a", 1)))
    with pytest.raises(SeqChangedError):
        arena.replay(EPOCH, batch(1, other))


def test_a_wrong_seq_says_which_comes_next(arena):
    apply(arena)
    apply(arena)
    with pytest.raises(SeqOldError) as old:
        arena.apply(EPOCH, batch(1))
    with pytest.raises(SeqGapError) as gap:
        arena.apply(EPOCH, batch(4))
    assert old.value.expected == gap.value.expected == 3
    assert arena.replay(EPOCH, batch(3)) is None


def test_a_stale_epoch_is_refused_everywhere(arena):
    for call in (
        lambda: arena.apply(6, batch(1)),
        lambda: arena.replay(6, batch(1)),
        lambda: arena.unary(6, Allocate("a", 1)),
        lambda: arena.reconcile(6, []),
        lambda: arena.end_epoch(6),
    ):
        with pytest.raises(EpochError):
            call()


# --- the file ---


def test_books_survive_their_process(path):
    with Arena.create(path, GEOMETRY) as arena:
        arena.set_policy(STEP)
        arena.open_epoch(EPOCH, ENGINE, "boot", b"a description")
        answer = arena.apply(EPOCH, batch(1, Allocate("a", 5)))
    with Arena.attach(path, GEOMETRY, "boot") as arena:
        assert arena.geometry == GEOMETRY
        assert arena.engine == ENGINE
        assert arena.description() == b"a description"
        assert arena.policy() == replace(STEP, version=2)
        assert arena.apply(EPOCH, batch(1, Allocate("a", 5))) == answer._replace(replayed=True)
        arena.check()


def test_another_boot_ends_the_epoch(path, arena):
    apply(arena, Allocate("a", 5))
    arena.close()
    with Arena.attach(path, boot_id="another boot") as again:
        report = again.report()
    assert (report.epoch, report.last_epoch, report.rebooted, report.live) == (0, EPOCH, True, 0)


def test_only_one_may_have_the_books(arena, path):
    with pytest.raises(BooksLockedError):
        Arena.attach(path)


def test_a_file_that_is_there_is_not_overwritten(path):
    path.write_text("mine")
    with pytest.raises(BooksError, match="File exists"):
        Arena.create(path, GEOMETRY)
    assert path.read_text() == "mine"


def test_the_file_is_for_its_owner_only(arena, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_books_that_cannot_be_used_say_why(arena, path, tmp_path):
    arena.close()
    with pytest.raises(PoolNotFoundError):
        Arena.attach(tmp_path / "none")
    with pytest.raises(BooksMismatchError, match="another geometry"):
        Arena.attach(path, GEOMETRY._replace(digest=1))
    path.chmod(0o644)
    with pytest.raises(BooksForeignError, match="644"):
        Arena.attach(path)
    path.chmod(0o600)
    os.truncate(path, 10_000)
    with pytest.raises(BooksCorruptError):
        Arena.attach(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("blocks", 0),
        ("blocks", 2**24 + 1),
        ("block_tokens", 24),
        ("max_regions", 0),
        ("max_ops", 4097),
        ("max_copies", 0),
        ("model_length_tokens", 0),
    ],
)
def test_a_bad_geometry_names_its_field(path, field, value):
    with pytest.raises(InvalidError) as caught:
        Arena.create(path, GEOMETRY._replace(**{field: value}))
    assert caught.value.field == field
    assert not path.exists()


def test_no_room_for_the_books_is_an_error_at_once(path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(PoolLimitError, match="cannot reserve"):
            Arena.create(path, GEOMETRY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.exists()


def test_a_closed_arena_says_so(arena):
    with pytest.raises(InvalidError):
        apply(arena, completed_seq=9)
    arena.close()
    arena.close()
    with pytest.raises(BooksError, match="closed"):
        arena.report()
    with pytest.raises(BooksError, match="closed"):
        arena.apply(EPOCH, batch(1))


def test_a_child_process_has_to_attach_for_itself(arena):
    child = os.fork()
    if child == 0:
        try:
            arena.report()
        except BooksError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert arena.report().epoch == EPOCH


def test_an_epoch_number_is_never_used_again(arena):
    for epoch in (EPOCH, 0, 2**53, 2**64, -1):
        with pytest.raises(InvalidError) as caught:
            arena.open_epoch(epoch, ENGINE, "boot", b"")
        assert caught.value.field == "epoch"
    arena.open_epoch(EPOCH + 1, ENGINE, "boot", b"")
    with pytest.raises(EpochError):
        arena.apply(EPOCH, batch(1))


# --- policy ---


def test_a_policy_comes_back_as_it_was_set(arena):
    policy = PolicyRecord(
        name="odma",
        start=Start.QUANTILE,
        overflow=Overflow.RELOCATE,
        step_tokens=32,
        limits_tokens=tuple(range(16, 17 * 16, 16)),
        overflow_risk=0.25,
        safety_share=0.125,
        unsure_ratio=4.5,
        growth=1.75,
        tenant_share=0.5,
        max_copy_tokens=2**32 - 1,
    )
    version = arena.set_policy(policy)
    assert arena.policy() == replace(policy, version=version)


def test_a_policy_is_set_only_over_the_expected_version(arena):
    version = arena.policy().version
    with pytest.raises(VersionError) as caught:
        arena.set_policy(STEP, version + 1)
    assert caught.value.actual == version
    assert arena.set_policy(STEP, version) == version + 1


# --- outside of batches ---


def test_a_single_operation_takes_no_seq(arena):
    apply(arena)
    place = arena.unary(EPOCH, Allocate("a", 20))
    assert arena.unary(EPOCH, Allocate("a", 20)) == place
    assert arena.unary(EPOCH, Extend(place.handle, 64)).length_tokens >= 64
    assert arena.unary(EPOCH, Free(place.handle, End.ABORTED)) == Freed()
    assert arena.report().seq == 1


def test_a_single_operation_names_its_field(arena):
    with pytest.raises(InvalidError) as caught:
        arena.unary(EPOCH, Allocate("a", 2**32))
    assert caught.value.field == "allocate.prompt_tokens"


def test_reconcile_frees_what_is_not_listed(arena):
    a, b = apply(arena, Allocate("a", 1), Allocate("b", 1))
    kept, freed = arena.reconcile(EPOCH, [b.handle, 12345])
    assert kept == [b, Place(12345, 0, 0)]
    assert freed == [a.handle]
    with pytest.raises(InvalidError, match="handles"):
        arena.reconcile(EPOCH, [-1])


# --- reading ---


def test_regions_are_listed_in_address_order_from_a_token(arena):
    a, b = apply(arena, Allocate("a", 20, 3, request_class="chat"), Allocate("b", 1, tenant="t"))
    first, second = arena.regions()
    assert (first.handle, second.handle) == (a.handle, b.handle)
    assert (first.request_id, first.request_class, first.live) == ("a", "chat", True)
    assert (first.prompt_tokens, first.generated_tokens, first.max_total_tokens) == (20, 3, 512)
    assert arena.regions(from_token=1) == [second]
    assert arena.regions(room=1) == [first]


def test_a_vacated_run_waits_for_its_completion(path):
    with Arena.create(path, GEOMETRY) as arena:
        arena.open_epoch(EPOCH, ENGINE._replace(single_ordered_stream=False), "boot", b"")
        (place,) = apply(arena, Allocate("a", 5, max_total_tokens=64))
        apply(arena, Free(place.handle, End.FINISHED, 1))
        (waiting,) = arena.regions()
        assert (waiting.live, waiting.awaits_seq, waiting.length_tokens) == (False, 2, 64)
        assert arena.report().awaiting_completion_tokens == 64
        apply(arena, completed_seq=2)
        assert arena.regions() == []


# --- what was learnt ---


def test_completions_are_counted_by_class(arena):
    complete(arena, [10, 20], request_class="chat")
    complete(arena, [30], End.HIT_LIMIT)
    assert arena.class_names() == ["chat", ""]
    assert [arena.class_index(name) for name in ("chat", "", "new", "x" * 33)] == [
        0,
        1,
        CLASS_POOL,
        CLASS_POOL,
    ]
    pool, chat = arena.histogram(), arena.histogram(0)
    assert (pool.completions, chat.completions) == (3, 2)
    bins = arena.bins()
    lengths = [bins[np.flatnonzero(array)].tolist() for array in pool[1:]]
    assert lengths == [[16, 32], [32], [16, 32], [32]]
    assert pool.output_censored.sum() == pytest.approx(1.0)
    assert [(entry.output_tokens, entry.censored) for entry in arena.completions()] == [
        (10, False),
        (20, False),
        (30, True),
    ]


def test_a_completion_remembers_its_prediction(arena):
    answer = arena.apply(EPOCH, batch(1, Allocate("a", 9)), [FLAT])
    apply(arena, Free(answer.results[0].handle, End.FINISHED, 4))
    (entry,) = arena.completions(0)
    assert entry == (FLAT, 9, 4, False)
    complete(arena, [1])
    assert arena.completions(0)[-1].quantiles is None


def test_quantiles_need_32_completions(arena):
    complete(arena, [100] * 31, request_class="chat")
    assert arena.quantiles(0) is None
    complete(arena, [100], request_class="code")
    assert arena.quantiles(0) == arena.quantiles(1) == arena.quantiles(CLASS_POOL)
    assert arena.quantiles(CLASS_OTHER) is not None


def test_quantiles_are_interpolated_inside_a_bin(arena):
    complete(arena, [100] * 50)  # in (96, 112]
    quantiles, weight = arena.quantiles(CLASS_POOL)
    assert quantiles == pytest.approx(
        [96 + 16 * level for level in (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)], rel=1e-6
    )
    assert weight == pytest.approx(50, rel=0.05)


def test_quantiles_beyond_what_was_generated_are_longer(arena):
    complete(arena, [50] * 40 + [200] * 40)
    below, _ = arena.quantiles(CLASS_POOL)
    above, _ = arena.quantiles(CLASS_POOL, more_than=64)
    assert below[0] < 64 < 192 < above[0]
    assert arena.quantiles(CLASS_POOL, more_than=400) is None


def test_what_no_class_can_be_is_refused(arena):
    for call in (arena.histogram, arena.completions, arena.quantiles):
        with pytest.raises(InvalidError, match="class_index"):
            call(66)


# --- bucket limits ---

BINS = st.lists(
    st.tuples(
        st.integers(1, 50),
        st.integers(0, 20) | st.floats(0, 20),
        st.just(0.0) | st.floats(0, 1_000),
    ),
    min_size=1,
    max_size=9,
)


def least_waste(weights, upper, tolls, limit_count):
    """Try every choice of limits that ends with the last bin."""
    choices = (
        (*others, upper[-1])
        for count in range(min(limit_count, len(upper)))
        for others in combinations(upper[:-1], count)
    )
    return min(waste_of(weights, upper, tolls, limits) for limits in choices)


def waste_of(weights, upper, tolls, limits):
    reserved = sum(
        weight * (min(limit for limit in limits if limit >= length) - length)
        for weight, length in zip(weights, upper, strict=True)
    )
    return reserved + sum(tolls[upper.index(limit)] for limit in limits[:-1])


@given(BINS, st.integers(1, 5))
def test_no_limits_waste_less_than_the_optimal_ones(bins, limit_count):
    gaps, weights, tolls = zip(*bins, strict=True)
    upper = np.cumsum(gaps).tolist()
    limits, waste = optimal_limits(weights, upper, limit_count, np.array(tolls))
    assert list(limits) == sorted(set(limits))
    assert limits[-1] == upper[-1]
    assert len(limits) <= limit_count
    assert set(limits) <= set(upper)
    assert waste == pytest.approx(waste_of(weights, upper, tolls, limits), abs=1e-6)
    assert waste == pytest.approx(least_waste(weights, upper, tolls, limit_count), abs=1e-6)
    if not any(tolls):
        assert optimal_limits(weights, upper, limit_count) == (limits, waste)


def test_limits_that_cannot_be_found_are_refused():
    for weights, upper, limit_count in (
        ([], [], 1),
        ([1.0], [16], 0),
        ([1.0], [16], 17),
        ([1.0, 1.0], [16, 16], 1),
        ([-1.0], [16], 1),
        ([float("nan")], [16], 1),
        ([1.0], [16, 32], 1),
    ):
        with pytest.raises(InvalidError):
            optimal_limits(weights, upper, limit_count)


def test_a_running_request_is_known_as_far_as_it_was_reported(arena):
    first, second = (Allocate(name, 20, max_total_tokens=160) for name in "ab")
    raw = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
    answer = arena.apply(EPOCH, Batch(1, 0, [], [first, second]), [Prediction(None, raw), None])
    handles = [place.handle for place in answer.results]
    arena.apply(EPOCH, Batch(2, 1, [Used(handles[0], 24)], []))
    running = {int(entry["issue"]): entry for entry in arena.running()}
    told, silent = running[min(running)], running[max(running)]
    assert (told["output_tokens"], silent["output_tokens"]) == (4, 0)
    assert told["censored"] == silent["censored"] == 1
    assert tuple(told["raw"]) == raw
    assert told["quantiles"][0] < 0
    assert told["until"] == silent["until"] == max(running)
    arena.apply(EPOCH, Batch(3, 2, [], [Free(handles[0], End.FINISHED, 77)]))
    ring, ever = arena.ring()
    assert (ever, len(ring), ring[-1]["output_tokens"]) == (1, 1, 77)
    assert tuple(ring[-1]["raw"]) == raw
