"""Pools: what an owner says, epochs, and one operation at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from odma_service.errors import (
    BooksError,
    BooksLockedError,
    BooksMismatchError,
    EpochError,
    HandleError,
    InvalidError,
    PoolNotFoundError,
    RefusedError,
    SeqGapError,
    VersionError,
)
from odma_service.pool import Pool, PoolSpec, set_aside
from odma_service.pool.geometry import PRESETS, Geometry, device
from odma_service.pool.policy import named
from odma_service.values import (
    Allocate,
    Batch,
    End,
    Extend,
    Free,
    Freed,
    Moves,
    PlaneGroup,
    Reason,
    Used,
)

EPOCH = 5
BOOT = "a boot"
SPEC = PoolSpec(
    name="llama-3.1",
    open_id="open-1",
    geometry=Geometry((PlaneGroup(56, 1024),)),
    capacity_tokens=1024,
    model_length_tokens=512,
    moves=Moves.ANY,
    single_ordered_stream=True,
    copies_may_overlap=True,
    max_regions=32,
    max_ops=64,
    max_copies=64,
)
ELASTIC = named("elastic", 512, 1024)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "llama-3.1.books"


@pytest.fixture
def pool(path):
    with Pool.create(path, SPEC, EPOCH, BOOT, ELASTIC) as pool:
        yield pool


# --- what an owner says ---


def test_capacity_becomes_whole_blocks():
    assert replace(SPEC, capacity_tokens=1039).capacity_tokens == 1024
    assert replace(SPEC, capacity_tokens=1039).arena_geometry().blocks == 64


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("name", ["", ".hidden", "a/b", "a" * 65, "a b", "é", "a\n"]),
        ("open_id", ["", "x" * 65]),
        ("capacity_tokens", [0, -1, 15, 2**28 + 16, 1.5]),
        ("model_length_tokens", [0, -1, 2**24 + 1]),
        ("moves", [0, 4, None]),
        ("block_tokens", [0, 3, 2048, -16]),
        ("ttl_seconds", [0, 86_401]),
        ("retention_seconds", [59, 2_592_001]),
        ("max_regions", [0, 65_537]),
        ("max_ops", [0, 4097]),
        ("max_copies", [0, 4097]),
    ],
)
def test_a_field_that_breaks_its_rule_is_named(field, values):
    for value in values:
        with pytest.raises(InvalidError) as caught:
            replace(SPEC, **{field: value})
        assert caught.value.field == field


def test_tokens_as_blocks_leave_less_capacity():
    replace(SPEC, block_tokens=1, capacity_tokens=2**24)
    with pytest.raises(InvalidError, match="capacity_tokens"):
        replace(SPEC, block_tokens=1, capacity_tokens=2**24 + 1)


def test_planes_keep_their_alignment_in_every_block():
    aligned = Geometry((PlaneGroup(1, 100, 64),))
    replace(SPEC, geometry=aligned, block_tokens=16)
    with pytest.raises(InvalidError, match=r"planes\[0\].alignment_bytes"):
        replace(SPEC, geometry=aligned, block_tokens=8)


def test_a_spec_is_read_back_as_it_was_written():
    spec = replace(SPEC, device=device("mlu370-x8", 1e12, 3e-7), moves=Moves.NONE)
    assert PoolSpec.from_json(spec.to_json()) == spec
    largest = Geometry(tuple(PlaneGroup(64, 2**24 - i, 1) for i in range(64)))
    assert len(replace(spec, geometry=largest).to_json()) < 8192


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"\xff", b'{"geometry": [[1]]}'])
def test_another_text_is_no_spec(text):
    with pytest.raises(BooksMismatchError):
        PoolSpec.from_json(text)


def test_prices_follow_from_the_device_and_the_planes():
    engine = SPEC.engine()
    assert engine.planes == 56
    assert engine.descriptor_seconds == 100e-9
    assert engine.token_seconds == PRESETS["mlu370-x4"].token_seconds(57_344)


# --- epochs ---


def test_a_new_pool_is_owned_and_empty(pool):
    assert (pool.epoch, pool.last_seq, pool.spec) == (EPOCH, 0, SPEC)
    assert pool.report().live == 0
    assert pool.policy() == replace(ELASTIC, version=pool.policy().version)


def test_a_pool_is_taken_up_where_its_process_left_it(pool, path):
    batch = Batch(1, 0, [], [Allocate("a", 100)])
    answer = pool.apply(EPOCH, batch)
    pool.close()
    with Pool.attach(path, BOOT) as again:
        assert (again.epoch, again.last_seq, again.spec) == (EPOCH, 1, SPEC)
        assert again.policy() == pool.policy()
        assert again.replay(EPOCH, batch) == answer._replace(replayed=True)


def test_a_closed_pool_keeps_what_it_learnt(pool, path):
    place = pool.allocate(EPOCH, Allocate("a", 100))
    pool.free(EPOCH, Free(place.handle, End.FINISHED, 30))
    pool.close_epoch(EPOCH)
    assert pool.epoch == 0
    pool.close()
    with Pool.attach(path, BOOT) as again:
        assert (again.epoch, again.spec) == (0, SPEC)
        assert again.histogram().completions == 1
        with pytest.raises(EpochError):
            again.apply(EPOCH, Batch(1, 0, [], []))
        later = replace(SPEC, open_id="open-2", moves=Moves.NONE)
        again.open_epoch(later, EPOCH + 1, BOOT)
        assert (again.epoch, again.last_seq, again.spec) == (EPOCH + 1, 0, later)
        assert again.policy() == pool.policy()


def test_another_boot_closes_a_pool(pool, path):
    pool.close()
    with Pool.attach(path, "another boot") as again:
        assert (again.epoch, again.spec) == (0, SPEC)


def test_a_take_over_empties_the_books(pool):
    pool.allocate(EPOCH, Allocate("a", 100))
    pool.open_epoch(SPEC, EPOCH + 1, BOOT, named("odma", 512, 1024))
    assert pool.report().live == 0
    assert pool.policy().name == "odma"
    with pytest.raises(EpochError, match=r"llama-3\.1"):
        pool.allocate(EPOCH, Allocate("a", 100))


def test_an_epoch_comes_after_every_earlier_one(pool, path):
    version = pool.policy().version
    for epoch in (EPOCH, 0, -1, 2**53):
        with pytest.raises(InvalidError, match="epoch"):
            pool.open_epoch(SPEC, epoch, BOOT, ELASTIC)
    assert (pool.epoch, pool.policy().version) == (EPOCH, version)
    with pytest.raises(EpochError):
        pool.close_epoch(EPOCH + 1)
    other = path.with_name("other.books")
    with pytest.raises(InvalidError, match="epoch"):
        Pool.create(other, SPEC, 0, BOOT, ELASTIC)
    assert not other.exists()


def test_books_serve_one_geometry_only(pool, path):
    wider = replace(SPEC, geometry=Geometry((PlaneGroup(56, 2048),)))
    with pytest.raises(BooksMismatchError):
        pool.open_epoch(wider, EPOCH + 1, BOOT)
    pool.close()
    with pytest.raises(BooksMismatchError):
        Pool.attach(path, BOOT, wider)
    Pool.attach(path, BOOT, SPEC).close()


def test_books_that_are_there_are_not_made_again(pool, path):
    with pytest.raises(BooksError):
        Pool.create(path, SPEC, EPOCH, BOOT, ELASTIC)
    with pytest.raises(BooksLockedError):
        Pool.attach(path, BOOT)
    with pytest.raises(PoolNotFoundError):
        Pool.attach(path.with_name("other"), BOOT)
    assert pool.report().epoch == EPOCH


def test_books_without_a_description_are_no_pools(pool, path):
    pool._arena.open_epoch(EPOCH + 1, SPEC.engine(), BOOT, b"")
    pool.close()
    with pytest.raises(BooksMismatchError, match="describe no pool"):
        Pool.attach(path, BOOT)
    Pool.create(path.with_name("other"), SPEC, EPOCH, BOOT, ELASTIC).close()


def test_books_are_set_aside_with_a_reason(path):
    for number in (1, 2):
        path.write_text(f"broken {number}")
        aside = set_aside(path, "the header's sum is wrong")
        assert aside.name == f"llama-3.1.books.set-aside-{number}"
        assert aside.read_text() == f"broken {number}"
        assert "sum is wrong" in aside.with_name(f"{aside.name}.reason").read_text()
        assert not path.exists()


# --- operations ---


def test_a_batch_counts_its_seq(pool):
    pool.apply(EPOCH, Batch(1, 0, [], []))
    answer = pool.apply(EPOCH, Batch(2, 1, [], [Allocate("a", 100)]))
    pool.apply(EPOCH, Batch(3, 2, [Used(answer.results[0].handle, 101)], []))
    assert pool.last_seq == 3
    with pytest.raises(SeqGapError):
        pool.replay(EPOCH, Batch(5, 3, [], []))
    assert pool.report().used_tokens == 101


def test_one_region_lives_under_one_request_id(pool):
    first = pool.allocate(EPOCH, Allocate("a", 100))
    assert pool.allocate(EPOCH, Allocate("a", 100)) == first
    with pytest.raises(InvalidError) as caught:
        pool.allocate(EPOCH, Allocate("a", 101))
    assert caught.value.field == "allocate.request_id"


def test_a_full_pool_refuses_with_its_numbers(pool):
    a = pool.allocate(EPOCH, Allocate("a", 440))
    b = pool.allocate(EPOCH, Allocate("b", 300))
    with pytest.raises(RefusedError) as caught:
        pool.allocate(EPOCH, Allocate("c", 400))
    refusal = caught.value.refusal
    assert refusal.reason is Reason.NO_SPACE
    free_tokens = 1024 - a.length_tokens - b.length_tokens
    assert refusal.free_tokens == refusal.largest_run_tokens == free_tokens


def test_a_region_grows_in_place_or_not_at_all(pool):
    a, b = (pool.allocate(EPOCH, Allocate(name, 100)) for name in "ab")
    assert pool.extend(EPOCH, Extend(b.handle, 300)).start_token == b.start_token
    with pytest.raises(RefusedError):
        pool.extend(EPOCH, Extend(a.handle, 300))
    with pytest.raises(InvalidError) as caught:
        pool.extend(EPOCH, Extend(a.handle, 0))
    assert caught.value.field == "extend.least_tokens"


def test_freeing_twice_is_fine_but_not_freeing_what_never_was(pool):
    place = pool.allocate(EPOCH, Allocate("a", 100))
    assert pool.free(EPOCH, Free(place.handle, End.FINISHED, 1)) == Freed()
    assert pool.free(EPOCH, Free(place.handle, End.FINISHED, 1)) == Freed(already_free=True)
    with pytest.raises(HandleError) as caught:
        pool.extend(EPOCH, Extend(place.handle, 200))
    assert caught.value.handle == place.handle
    with pytest.raises(HandleError):
        pool.free(EPOCH, Free(12_345, End.FINISHED))
    with pytest.raises(InvalidError) as bad:
        pool.free(EPOCH, Free(place.handle, 9))
    assert bad.value.field == "free.end"


def test_an_owner_that_lost_its_mind_keeps_what_it_lists(pool):
    a, b = (pool.allocate(EPOCH, Allocate(name, 100)) for name in "ab")
    kept, freed = pool.reconcile(EPOCH, [a.handle])
    assert (kept, freed) == ([a], [b.handle])
    pool.check()


def test_a_policy_is_changed_only_if_it_is_the_expected_one(pool):
    version = pool.policy().version
    for expected in (0, version + 1):
        with pytest.raises(VersionError):
            pool.set_policy(ELASTIC, expected)
    assert pool.set_policy(ELASTIC, version) == pool.policy().version == version + 1
    assert pool.set_policy(ELASTIC) == version + 2


# --- reading ---


def test_classes_are_told_by_name(pool):
    for name in ("chat", "code", "chat"):
        place = pool.allocate(EPOCH, Allocate("a", 100, request_class=name))
        pool.free(EPOCH, Free(place.handle, End.FINISHED, 30))
    chat, code = pool.classes()
    assert (chat.request_class, chat.histogram.completions) == ("chat", 2)
    assert (code.request_class, code.histogram.completions) == ("code", 1)
    assert chat.output_quantiles is None
    assert pool.histogram().completions == 3


def test_the_65th_class_shares_its_statistics(pool):
    for number in range(66):
        place = pool.allocate(EPOCH, Allocate("a", 100, request_class=f"class {number}"))
        assert pool.regions()[0].request_class == (f"class {number}" if number < 64 else "(other)")
        pool.free(EPOCH, Free(place.handle, End.FINISHED, 30))
    classes = pool.classes()
    assert len(classes) == 65
    assert classes[-1].request_class == "(other)"
    assert classes[-1].histogram.completions == 2
    assert pool.quantiles("class 65") == pool.quantiles("class 1")


def test_no_class_has_the_name_of_those_that_share(pool):
    for name in ["(other)", "(other)'", *map(str, range(63))]:
        place = pool.allocate(EPOCH, Allocate("a", 100, request_class=name))
        pool.free(EPOCH, Free(place.handle, End.FINISHED, 30))
    names = [known.request_class for known in pool.classes()]
    assert len(set(names)) == len(names) == 65
    assert names[-1] == "(other)''"
