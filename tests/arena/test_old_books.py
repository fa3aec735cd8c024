"""Books that an earlier library of the same layout wrote: they attach, answer retries and go on.

`old_books` holds two files, as xz in hex: one whose last batch gives all that is optional, one
whose last batch gives nothing. `write` made them, with the library of that day.
"""

from __future__ import annotations

import lzma
from dataclasses import replace
from pathlib import Path

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
    Prediction,
    Start,
    TenantShare,
    Trim,
    Used,
)

OLD_BOOKS = Path(__file__).with_name("old_books")
EPOCH = 5
GEOMETRY = ArenaGeometry(
    blocks=256,
    block_tokens=16,
    max_regions=8,
    max_ops=8,
    max_copies=8,
    model_length_tokens=512,
    digest=3,
)
POLICY = PolicyRecord(
    "mine",
    Start.QUANTILE,
    Overflow.COMPACT,
    step_tokens=32,
    limits_tokens=(64, 128),
    overflow_risk=0.2,
    max_copy_tokens=4096,
    tenants=(TenantShare("blue", 0.25, 0.75),),
)
QUANTILES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
ALL_GIVEN = Allocate("given", 20, 3, 200, "code", "blue", 0.0, 40, "a text")
NONE_GIVEN = Allocate("not given", 20)
LAST_BATCHES = {
    "given": ([ALL_GIVEN], [Prediction(QUANTILES, QUANTILES)], 0),
    "not_given": ([NONE_GIVEN], [None], None),
}


def last_batch(name, handle):
    """Return the last batch of a file, whose second operation extends `handle`."""
    ops, predictions, max_copy_tokens = LAST_BATCHES[name]
    used = [Used(handle, 30, pinned=True)]
    return Batch(3, 2, used, [*ops, Extend(handle, 40)], max_copy_tokens), [*predictions, None]


def write(path, name):
    """Make the books of `name` and return the last answer."""
    with Arena.create(path, GEOMETRY) as arena:
        arena.set_policy(POLICY)
        arena.open_epoch(EPOCH, EngineRecord(Moves.ANY, True, True, 2, 1e-7, 1e-8), "boot", b"it")
        first = [Allocate("a", 30, request_class="code"), Allocate("b", 20), Allocate("c", 50)]
        places = arena.apply(EPOCH, Batch(1, 0, [], first), [QUANTILES, None, None]).results
        a, b, c = (place.handle for place in places)
        arena.apply(EPOCH, Batch(2, 1, [], [Free(b, End.FINISHED, 9), Trim(c, 64)]))
        return arena.apply(EPOCH, *last_batch(name, a))


@pytest.fixture(params=LAST_BATCHES)
def name(request):
    return request.param


@pytest.fixture
def books(tmp_path, name):
    path = tmp_path / "old.pool"
    path.touch(mode=0o600)
    path.write_bytes(lzma.decompress(bytes.fromhex((OLD_BOOKS / f"{name}.hex").read_text())))
    with Arena.attach(path, GEOMETRY) as arena:
        yield arena


def handle_of(arena, request_id):
    return next(entry.handle for entry in arena.regions() if entry.request_id == request_id)


def test_they_say_what_was_written(books):
    books.check()
    report = books.report()
    assert (report.epoch, report.seq, report.live) == (EPOCH, 3, 3)
    assert (report.counters.allocates, report.counters.finished) == (4, 1)
    assert (books.policy(), books.description()) == (replace(POLICY, version=2), b"it")
    assert books.class_names() == ["code", ""]


def test_a_retry_of_the_last_batch_gets_the_stored_answer(books, name):
    answer = books.apply(EPOCH, *last_batch(name, handle_of(books, "a")))
    assert answer.replayed
    placed, extended = answer.results
    assert isinstance(placed, Place)
    assert extended.handle == handle_of(books, "a")


def test_they_go_on_as_books_written_today_do(books, name, tmp_path):
    write(tmp_path / "new.pool", name)
    with Arena.attach(tmp_path / "new.pool", GEOMETRY) as today:
        assert books.regions() == today.regions()
        assert books.report() == today.report()
        step = Batch(4, 3, [], [Allocate("d", 60), Free(handle_of(books, "a"), End.HIT_LIMIT, 50)])
        assert books.apply(EPOCH, step) == today.apply(EPOCH, step)
    books.check()
