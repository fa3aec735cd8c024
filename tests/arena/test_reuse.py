"""What is kept, and what a request reuses: the rules one by one.

The memory behind the pool is an array with a name for each token, so that a place that is said
to need no prefill can be looked at.
"""

from __future__ import annotations

import hashlib
from itertools import count

import numpy as np
import pytest

from odma_service._native import Arena, ArenaGeometry, EngineRecord, PolicyRecord
from odma_service.errors import InvalidError, SeqChangedError
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
    Reason,
    Start,
    Trim,
    Used,
)

UNIT, GRANULE = 16, 64


def keys_of(text, granules):
    """Return the chained keys of the first granules of what `text` stands for."""
    keys, key = [], text.encode()
    for _ in range(granules):
        key = hashlib.blake2b(key, digest_size=16).digest()
        keys.append(key)
    return b"".join(keys)


def names_of(keys, granules):
    """Return the name of each token of granules that keys stand for."""
    parts = [
        np.int64(int.from_bytes(keys[16 * i : 16 * i + 6], "little")) * 512 + np.arange(GRANULE)
        for i in range(granules)
    ]
    return np.concatenate([*parts, np.empty(0, np.int64)])


class Engine:
    """A pool of so many granules, its memory, and an engine that says what it has written."""

    def __init__(self, path, granules=32, *, ordered=True, moves=Moves.ANY, **fields):
        blocks = granules * GRANULE // UNIT
        self.path = path
        self.arena = Arena.create(
            path,
            ArenaGeometry(
                blocks,
                UNIT,
                fields.pop("max_regions", 64),
                64,
                fields.pop("max_copies", 64),
                blocks * UNIT,
                0,
                GRANULE,
            ),
        )
        self.arena.set_policy(PolicyRecord("reuse", Start.STEP, Overflow.COMPACT, UNIT, **fields))
        engine = EngineRecord(moves, ordered, True, 2, 1e-6, 1e-7)
        self.arena.open_epoch(1, engine, "boot", b"")
        self.seq, self.ids, self.completed = 0, count(), 0
        self.ordered = ordered
        self.memory = np.full(blocks * UNIT, -1, np.int64)
        self.keys = {}

    def ask(self, keys, tokens=None, name=None, more=0):
        tokens = len(keys) // 16 * GRANULE + 1 if tokens is None else tokens
        return Allocate(
            name or f"{next(self.ids)}", tokens, max_total_tokens=tokens + UNIT + more, keys=keys
        )

    def step(self, *ops, used=(), completed=None, copy_tokens=None):
        self.seq += 1
        done = self.seq - 1 if self.ordered else self.completed
        self.completed = done if completed is None else completed
        batch = Batch(self.seq, self.completed, list(used), list(ops), copy_tokens, True)
        self.last = batch, self.arena.apply(1, batch, [None] * len(ops))
        self.arena.check()
        for copy in self.last[1].copies:
            source = self.memory[copy.from_token : copy.from_token + copy.tokens].copy()
            self.memory[copy.to_token : copy.to_token + copy.tokens] = source
        for op, result in zip(ops, self.last[1].results, strict=True):
            if isinstance(op, Allocate) and isinstance(result, Place) and result.length_tokens:
                self.look_at(op, result)
        return self.last[1].results

    def alone(self, op):
        result = self.arena.unary(1, op)
        self.arena.check()
        if isinstance(op, Allocate) and isinstance(result, Place):
            self.look_at(op, result)
        return result

    def look_at(self, op, place):
        """Insist that what is reused is there, and write the rest of the prompt."""
        granules = place.reused_tokens // GRANULE
        assert place.reused_tokens % GRANULE == 0
        assert place.reused_tokens < op.prompt_tokens + op.generated_tokens
        there = self.memory[place.start_token : place.start_token + place.reused_tokens]
        assert (there == names_of(op.keys, granules)).all(), "what is reused is not there"
        self.write(place, op.keys)

    def write(self, place, keys):
        names = names_of(keys, len(keys) // 16)
        self.memory[place.start_token : place.start_token + len(names)] = names

    def keep(self, place, tokens, keys=b""):
        return Free(place.handle, End.ABORTED, 0, tokens, keys)

    def fill(self, text, granules):
        """Let a request run, and keep it."""
        keys = keys_of(text, granules)
        place = self.step(self.ask(keys))[0]
        used = [Used(place.handle, granules * GRANULE)]
        self.step(self.keep(place, granules * GRANULE), used=used)
        if not self.ordered:
            self.step(completed=self.seq)
        return keys

    def is_kept(self, keys):
        """Whether a kept run holds what so many keys stand for."""
        names = names_of(keys, len(keys) // 16)
        entries = [entry for entry in self.arena.regions() if entry.kept]
        found = [self.memory[e.start_token :][: e.shareable_tokens] for e in entries]
        return any(np.array_equal(there, names) for there in found)

    @property
    def reuse(self):
        return self.arena.report().reuse

    def again(self):
        """Attach as after the death of the process."""
        self.arena.close()
        self.arena = Arena.attach(self.path)
        self.arena.check()


@pytest.fixture(params=[True, False], ids=["ordered", "several streams"])
def ordered(request):
    return request.param


@pytest.fixture
def engine(tmp_path, ordered):
    return Engine(tmp_path / "p.pool", ordered=ordered)


# --- adopting ---


def test_a_request_continues_what_one_that_ended_has_written(engine):
    first = engine.fill("talk", 4)
    report = engine.arena.report()
    assert (report.reuse.kept_runs, report.reuse.kept_tokens) == (1, 4 * GRANULE)
    assert report.free_tokens == engine.memory.size, "kept memory counts as free"
    assert report.reserved_tokens == 0
    keys = keys_of("talk", 6)
    assert keys.startswith(first)
    place = engine.step(engine.ask(keys))[0]
    assert place.reused_tokens == 4 * GRANULE
    assert (engine.reuse.adopted_tokens, engine.reuse.kept_runs) == (4 * GRANULE, 0)
    assert not engine.last[1].copies


def test_one_token_is_always_left_to_compute(engine):
    engine.fill("talk", 4)
    place = engine.step(engine.ask(keys_of("talk", 4), 4 * GRANULE))[0]
    assert place.reused_tokens == 3 * GRANULE


def test_a_lone_allocate_adopts_but_does_not_copy(engine):
    keys = engine.fill("talk", 4)
    place = engine.alone(engine.ask(keys))
    assert place.reused_tokens == 4 * GRANULE
    assert engine.alone(engine.ask(keys)).reused_tokens == 0, "it would have to be copied"


def test_a_handle_of_the_dead_stays_dead(engine):
    keys = keys_of("talk", 2)
    first = engine.step(engine.ask(keys))[0]
    engine.step(engine.keep(first, 128), used=[Used(first.handle, 128)])
    engine.step(completed=engine.seq)
    second = engine.step(engine.ask(keys))[0]
    assert second.reused_tokens == 128
    assert second.handle != first.handle
    assert engine.step(Free(first.handle, End.ABORTED))[0] == Freed(already_free=True)


def test_a_repeated_allocate_gets_the_same_answer_whatever_its_keys(engine):
    engine.fill("talk", 4)
    op = engine.ask(keys_of("talk", 4))
    place = engine.step(op)[0]
    assert engine.arena.unary(1, op._replace(keys=b"")) == place
    assert engine.arena.apply(1, engine.last[0]).results == [place]
    changed = engine.last[0]._replace(ops=[op._replace(keys=keys_of("other", 4))])
    with pytest.raises(SeqChangedError):
        engine.arena.apply(1, changed)


def test_keys_beyond_what_is_adopted_are_the_new_writers(engine):
    engine.fill("talk", 4)
    fork = keys_of("talk", 2) + keys_of("fork", 2)
    place = engine.step(engine.ask(fork), copy_tokens=0)[0]
    assert place.reused_tokens == 2 * GRANULE, "half of it is lost, and half is won"
    assert engine.reuse.gathered_tokens == 0
    engine.step(engine.keep(place, 256), used=[Used(place.handle, 256)])
    engine.step(completed=engine.seq)
    engine.again()
    assert engine.step(engine.ask(keys_of("talk", 4)), copy_tokens=0)[0].reused_tokens == 128
    assert engine.reuse.kept_tokens == 0


def test_keys_that_a_run_has_lost_do_not_stand_again_with_its_next_ones(engine):
    """The next ones lie elsewhere in the file, for another run has ended meanwhile."""
    engine.fill("talk", 4)
    other = engine.fill("other", 3)
    fork = engine.step(engine.ask(keys_of("talk", 2), 193), copy_tokens=0)[0]
    assert fork.reused_tokens == 2 * GRANULE
    ends = engine.step(engine.ask(other))[0]
    assert ends.reused_tokens == 3 * GRANULE
    engine.step(Free(ends.handle, End.ABORTED))
    engine.step(completed=engine.seq)
    more = keys_of("fork", 1)
    engine.step(engine.keep(fork, 192, more), used=[Used(fork.handle, 192)])
    engine.again()
    assert engine.reuse.kept_tokens == 192


# --- gathering ---


def test_a_beginning_of_one_that_lives_is_copied_once_it_is_final(engine):
    keys = keys_of("rules", 3)
    first = engine.step(engine.ask(keys))[0]
    used = Used(first.handle, 3 * GRANULE)
    assert engine.step(engine.ask(keys), used=[used])[0].reused_tokens == 0, "nobody promised"
    used = Used(first.handle, 3 * GRANULE, shareable_tokens=3 * GRANULE - 1)
    place = engine.step(engine.ask(keys), used=[used])[0]
    assert place.reused_tokens == 2 * GRANULE
    (copy,) = engine.last[1].copies
    assert (copy.handle, copy.from_token, copy.tokens) == (place.handle, first.start_token, 128)
    assert copy.to_token == place.start_token
    assert engine.reuse.gathered_tokens == 128


def test_a_kept_run_with_more_is_copied_from_and_stays(engine):
    keys = engine.fill("talk", 4)
    place = engine.step(engine.ask(keys_of("talk", 2) + keys_of("fork", 1)))[0]
    assert place.reused_tokens == 2 * GRANULE
    assert engine.reuse.gathered_tokens == 128
    engine.step(completed=engine.seq)
    assert engine.step(engine.ask(keys))[0].reused_tokens == 4 * GRANULE


def test_gathers_get_what_the_batch_leaves_in_whole_granules(engine):
    engine.fill("talk", 8)
    op = engine.ask(keys_of("talk", 3))
    assert engine.step(op, copy_tokens=2 * GRANULE + 63)[0].reused_tokens == 2 * GRANULE
    op = engine.ask(keys_of("talk", 3))
    assert engine.step(op, copy_tokens=GRANULE - 1)[0].reused_tokens == 0


def test_a_region_that_was_gathered_is_a_source_for_the_next(engine):
    engine.fill("talk", 4)
    op = engine.ask(keys_of("talk", 2))
    first = engine.step(op)[0]
    assert first.reused_tokens == 128
    engine.step(completed=engine.seq)
    engine.again()
    assert engine.step(engine.ask(keys_of("talk", 4)))[0].reused_tokens == 256
    assert engine.step(engine.ask(keys_of("talk", 2)))[0].reused_tokens == 128


def test_a_source_that_ends_in_the_batch_is_not_given_out_before_it_is_read(engine):
    """All of the pool but the source is full, so that its place is the only one."""
    keys = keys_of("rules", 4)
    source = engine.step(engine.ask(keys))[0]
    used = [Used(source.handle, 256, shareable_tokens=256)]
    rest = engine.arena.report().free_tokens - 5 * GRANULE
    other = engine.step(engine.ask(b"", rest - 1), used=used)[0]
    used.append(Used(other.handle, rest))
    results = engine.step(
        engine.ask(keys),
        Free(source.handle, End.ABORTED),
        engine.ask(b"", 2 * GRANULE),
        used=used,
    )
    assert results[0].reused_tokens == 256
    assert results[2].reason == Reason.WAITS_FOR_COMPLETION
    engine.step(completed=engine.seq)
    assert isinstance(engine.step(engine.ask(b"", 2 * GRANULE))[0], Place)


def test_what_is_kept_but_gathered_from_is_not_adopted_below_that(engine):
    keys = engine.fill("talk", 6)
    gather = engine.ask(keys_of("talk", 5) + keys_of("fork", 1))
    adopt = engine.ask(keys_of("talk", 4) + keys_of("else", 1), name="below")
    results = engine.step(gather, adopt, copy_tokens=5 * GRANULE)
    assert results[0].reused_tokens == 5 * GRANULE
    assert results[1].reused_tokens == 0, "it is read up to 5, and no token is left to copy"
    engine.step(completed=engine.seq)
    assert engine.step(engine.ask(keys))[0].reused_tokens == 6 * GRANULE


# --- keeping refuses nobody ---


def test_kept_memory_is_given_up_for_whoever_needs_it(engine):
    engine.fill("one", 4)
    engine.fill("two", 4)
    whole = engine.memory.size
    place = engine.step(engine.ask(b"", whole - UNIT))[0]
    assert place.length_tokens == whole
    assert engine.reuse.given_up_tokens == 8 * GRANULE


def test_what_was_not_used_for_longest_is_given_up_first(engine):
    for name in ("one", "two", "three"):
        engine.fill(name, 4)
        engine.step(engine.ask(b"", 1))  # so that no two are neighbours
    engine.step(engine.ask(keys_of("one", 1) + keys_of("x", 1), name="refreshes"))
    engine.step(completed=engine.seq)
    engine.step(engine.ask(b"", engine.arena.report().largest_run_tokens - UNIT))
    assert engine.reuse.kept_runs == 3
    assert isinstance(engine.step(engine.ask(b"", 3 * GRANULE))[0], Place)
    kept = [name for name in ("one", "two", "three") if engine.is_kept(keys_of(name, 4))]
    assert kept == ["one", "three"]


def test_nothing_is_given_up_for_whoever_is_refused_all_the_same(engine):
    engine.fill("talk", 4)
    large = engine.step(engine.ask(b"", 16 * GRANULE))[0]
    result = engine.step(engine.ask(b"", 17 * GRANULE), used=[Used(large.handle, 512)])[0]
    assert result.reason == Reason.NO_SPACE
    assert result.free_tokens == engine.memory.size - large.length_tokens
    assert engine.reuse.kept_runs == 1


def test_who_grows_takes_what_is_kept_behind_it(engine):
    first = engine.step(engine.ask(b"", GRANULE - 1, more=512))[0]
    engine.fill("talk", 4)
    grown = engine.alone(Extend(first.handle, 2 * GRANULE))
    assert grown.start_token == first.start_token
    assert engine.reuse.given_up_tokens == 4 * GRANULE


def test_who_grows_leaves_what_was_used_lately_and_takes_the_place_of_what_was_not(engine):
    old = engine.fill("old", 4)
    grows = engine.step(engine.ask(b"", GRANULE - 1, more=512))[0]
    behind = engine.fill("talk", 4)
    engine.step(engine.ask(b"", engine.memory.size - 8 * GRANULE - grows.length_tokens - UNIT))
    for _ in range(2):
        engine.step()
    used = [Used(grows.handle, GRANULE)]
    grown = engine.step(Extend(grows.handle, 2 * GRANULE), used=used)[0]
    assert grown.start_token == 0
    assert (engine.is_kept(old), engine.is_kept(behind)) == (False, True)


def test_kept_runs_have_a_table_of_their_own(tmp_path, ordered):
    engine = Engine(tmp_path / "p.pool", ordered=ordered, max_regions=4)
    for i in range(6):
        engine.fill(f"{i}", 1)
    assert engine.reuse.kept_runs == 4
    assert engine.step(engine.ask(keys_of("0", 1)))[0].reused_tokens == 0
    assert engine.step(engine.ask(keys_of("5", 1)))[0].reused_tokens == GRANULE
    places = engine.step(*(engine.ask(b"", 8) for _ in range(2)))
    assert all(isinstance(place, Place) for place in places)


# --- rule by rule ---


def test_a_move_carries_what_is_reused_and_not_only_what_is_said_to_be_used(tmp_path):
    engine = Engine(tmp_path / "p.pool", 8)
    hole = engine.step(engine.ask(b"", GRANULE - 1))[0]
    engine.fill("talk", 2)
    adopted = engine.step(engine.ask(keys_of("talk", 2)))[0]
    assert adopted.reused_tokens == 128
    engine.step(Free(hole.handle, End.ABORTED), used=[Used(adopted.handle, 0)])
    engine.step(
        engine.ask(b"", engine.memory.size - adopted.length_tokens - UNIT),
        used=[Used(adopted.handle, 0)],
    )
    assert sum(copy.tokens for copy in engine.last[1].copies) == 128
    moved = engine.last[1].moved[0]
    assert (moved.handle, moved.reused_tokens) == (adopted.handle, 128)
    there = engine.memory[moved.start_token : moved.start_token + 128]
    assert (there == names_of(keys_of("talk", 2), 2)).all()


def test_what_is_reused_or_shareable_is_not_trimmed(engine):
    engine.fill("talk", 4)
    place = engine.step(engine.ask(keys_of("talk", 4)))[0]
    used = [Used(place.handle, 10)]
    result = engine.step(Trim(place.handle, 200), used=used)[0]
    assert result.field.startswith("to_tokens: ")
    assert isinstance(engine.step(Trim(place.handle, 256), used=used)[0], Place)
    place = engine.step(engine.ask(keys_of("other", 4)))[0]
    used = [Used(place.handle, 10)]
    result = engine.step(Trim(place.handle, 200), used=used)[0]
    assert result.field.startswith("to_tokens: "), "it has keys, and a Free may continue them"


def test_several_streams_adopt_only_once_the_free_is_completed(tmp_path):
    engine = Engine(tmp_path / "p.pool", ordered=False)
    keys = keys_of("talk", 4)
    place = engine.step(engine.ask(keys))[0]
    used = [Used(place.handle, 256)]
    results = engine.step(engine.keep(place, 256), engine.ask(keys), used=used)
    assert results[1].reused_tokens == 256
    assert engine.reuse.gathered_tokens == 256, "in the batch itself it is copied"
    freed = engine.seq - 1
    assert engine.alone(engine.ask(keys)).reused_tokens == 0
    engine.step(completed=freed)
    assert engine.alone(engine.ask(keys)).reused_tokens == 0
    engine.step(completed=freed + 1)
    assert engine.alone(engine.ask(keys)).reused_tokens == 256


def test_several_streams_give_out_what_a_late_answer_reads_only_when_it_is_completed(tmp_path):
    engine = Engine(tmp_path / "p.pool", ordered=False)
    keys = engine.fill("talk", 4)
    engine.step(engine.ask(keys_of("talk", 2) + keys_of("fork", 1)))
    reads = engine.seq
    report = engine.arena.report()
    assert report.awaiting_completion_tokens == 4 * GRANULE
    engine.step(engine.ask(b"", report.largest_run_tokens - UNIT))
    large = engine.ask(b"", 3 * GRANULE)
    assert engine.step(large)[0].reason == Reason.WAITS_FOR_COMPLETION
    assert engine.reuse.kept_runs == 1
    below = engine.ask(keys_of("talk", 2) + keys_of("else", 1))
    assert engine.alone(below).reason == Reason.WAITS_FOR_COMPLETION
    assert isinstance(engine.step(large, completed=reads)[0], Place)
    assert (engine.reuse.kept_runs, engine.is_kept(keys)) == (0, False)


def test_a_lone_free_of_what_a_late_answer_reads_waits_too(tmp_path):
    engine = Engine(tmp_path / "p.pool", ordered=False)
    keys = keys_of("talk", 2)
    source = engine.step(engine.ask(keys))[0]
    engine.step(engine.ask(keys), used=[Used(source.handle, 128, shareable_tokens=128)])
    reads = engine.seq
    engine.alone(Free(source.handle, End.ABORTED))
    assert engine.arena.report().awaiting_completion_tokens == source.length_tokens
    engine.step(completed=reads)
    assert engine.arena.report().awaiting_completion_tokens == 0


@pytest.mark.parametrize("first", [True, False])
def test_a_source_that_moves_in_the_batch_is_read_where_its_tokens_are(tmp_path, ordered, first):
    """Ordered: after the slides, at its new place. Else: at its old one."""
    engine = Engine(tmp_path / "p.pool", 24, ordered=ordered, moves=Moves.OWN_GROWTH)
    keys = keys_of("rules", 2)
    source = engine.step(engine.ask(keys, more=1024))[0]
    engine.step(engine.ask(b"", GRANULE - 1))
    used = [Used(source.handle, 128, shareable_tokens=128)]
    grow, gather = Extend(source.handle, 6 * GRANULE), engine.ask(keys)
    results = engine.step(*((grow, gather) if first else (gather, grow)), used=used)
    grown, place = results if first else results[::-1]
    assert grown.start_token != source.start_token
    assert place.reused_tokens == 128
    copy = next(copy for copy in engine.last[1].copies if copy.handle == place.handle)
    assert copy.from_token == (grown if ordered else source).start_token


def test_reconcile_voids_what_is_kept_unless_the_last_answer_is_completed(engine):
    keys = engine.fill("talk", 2)
    lives = engine.step(engine.ask(keys))[0]
    engine.fill("kept", 2)
    engine.arena.reconcile(1, [lives.handle], engine.seq)
    engine.arena.check()
    assert engine.reuse.kept_runs == 1
    engine.completed = engine.seq
    engine.arena.reconcile(1, [lives.handle], engine.seq - 1)
    engine.arena.check()
    assert engine.reuse.kept_runs == 0
    assert engine.step(engine.ask(keys))[0].reused_tokens == 0, "its keys are void too"
    used = [Used(lives.handle, 144, shareable_tokens=144)]
    assert engine.step(engine.ask(keys), used=used)[0].reused_tokens == 0, "for ever"
    more = keys_of("talk", 2)[16:]  # nobody can tell any more which keys these continue
    assert engine.step(engine.keep(lives, 144, more), used=used)[0] == Freed()
    assert engine.reuse.kept_runs == 0
    assert engine.step(engine.ask(keys_of("kept", 2)))[0].reused_tokens == 0


def test_an_epochs_end_voids_all(engine):
    engine.fill("talk", 2)
    engine.arena.open_epoch(2, engine.arena.engine, "boot", b"")
    engine.arena.check()
    engine.again()
    assert engine.reuse.kept_runs == 0
    batch = Batch(1, 0, [], [engine.ask(keys_of("talk", 2))])
    assert engine.arena.apply(2, batch).results[0].reused_tokens == 0


def test_keys_of_another_life_of_a_slot_do_not_stand(engine):
    """A run that ends leaves its keys in the file; no later run has its generation."""
    engine.fill("talk", 4)
    engine.step(engine.ask(b"", engine.memory.size - UNIT))
    engine.again()
    handle = engine.arena.regions()[0].handle
    engine.step(Free(handle, End.ABORTED))
    engine.step(completed=engine.seq)
    engine.fill("other", 2)
    engine.again()
    assert engine.step(engine.ask(keys_of("talk", 4)))[0].reused_tokens == 0
    assert engine.step(engine.ask(keys_of("other", 2)))[0].reused_tokens == 128


# --- bad input ---


def test_bad_keys_are_the_operations_own_mistake(engine):
    place = engine.step(engine.ask(keys_of("a", 2)))[0]
    used = [Used(place.handle, 128)]
    bad = [
        (engine.ask(b"x" * 17, 1000), "keys: "),
        (engine.ask(keys_of("a", 3), 191), "keys: "),
        (engine.keep(place, 129), "keep_tokens: "),
        (engine.keep(place, 128, b"x" * 8), "keys: "),
        (engine.keep(place, 128, keys_of("b", 1)), "keys: "),
        (engine.keep(place, 0, keys_of("b", 1)), "keys: "),
    ]
    for op, field in bad:
        result = engine.step(op, used=used)[0]
        assert result.reason == Reason.INVALID
        assert result.field.startswith(field)
    assert engine.step(engine.keep(place, 128), used=used)[0] == Freed(already_free=False)


def test_a_batch_has_a_bound_of_keys_and_says_what_is_shareable_of_what_is_used(engine):
    place = engine.step(engine.ask(b"", 100))[0]
    with pytest.raises(InvalidError, match="shareable_tokens"):
        engine.step(used=[Used(place.handle, 100, shareable_tokens=101)])
    engine.seq -= 1
    with pytest.raises(InvalidError, match="8,192 keys"):
        engine.step(*(engine.ask(b"k" * 65_536, 100) for _ in range(3)))
    engine.seq -= 1
    result = engine.step(engine.ask(b"k" * 16 * 4097, 100))[0]
    assert result.field.startswith("keys: ")


def test_a_pool_without_granules_takes_no_keys(tmp_path):
    geometry = ArenaGeometry(64, UNIT, 8, 8, 8, 64 * UNIT, 0)
    with Arena.create(tmp_path / "p.pool", geometry) as arena:
        arena.open_epoch(1, EngineRecord(Moves.ANY, True, True, 2, 0, 0), "boot", b"")
        place = arena.unary(1, Allocate("a", 100))
        assert arena.unary(1, Allocate("b", 100, keys=b"k" * 16)).field.startswith("keys: ")
        assert arena.unary(1, Free(place.handle, End.ABORTED, 0, 64)).field.startswith("keys: ")
        used = [Used(place.handle, 64, shareable_tokens=64)]
        with pytest.raises(InvalidError, match="shareable_tokens"):
            arena.apply(1, Batch(1, 0, used, []))


@pytest.mark.parametrize("granule", [48, 63, 1024, 72])
def test_a_granule_is_whole_blocks_from_64_to_512(tmp_path, granule):
    with pytest.raises(InvalidError, match="granule_tokens"):
        ArenaGeometry(64, UNIT, 8, 8, 8, 64 * UNIT, 0, granule).check()


# --- deaths ---


def test_the_same_is_found_after_a_death(engine):
    first = engine.fill("talk", 4)
    other = engine.step(engine.ask(keys_of("lives", 3)))[0]
    engine.step(used=[Used(other.handle, 192, shareable_tokens=128)])
    before = engine.arena.regions(), engine.reuse
    engine.again()
    assert (engine.arena.regions(), engine.reuse) == before
    ops = [engine.ask(first), engine.ask(keys_of("lives", 3))]
    results = engine.step(*ops, used=[Used(other.handle, 192)])
    assert [place.reused_tokens for place in results] == [256, 128]
