"""`odma arena repair`: what damaged books still know, in fresh ones, and nothing else."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys

import pytest
from conftest import open_pool

from odma_service._native import (
    CLASS_POOL,
    Arena,
    ArenaGeometry,
    EngineRecord,
    Part,
    PolicyRecord,
)
from odma_service.client import Client, allocate, free
from odma_service.errors import BooksCorruptError, EpochError, OdmaError
from odma_service.values import Allocate, Batch, End, Free, Moves, Overflow, Start

COMPLETIONS = 60
SMALL = ArenaGeometry(64, 16, 16, 16, 16, 512, 7)
ENGINE = EngineRecord(Moves.ANY, False, True, 2, 1e-6, 1e-7)


def run(path, *flags):
    command = [sys.executable, "-m", "odma_service", "arena", "repair", str(path), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def repair(path, *flags, code=0):
    """Repair a file and return what is told, as an object or as an error."""
    done = run(path, *flags, "--json")
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout) if code == 0 else done.stderr


def of(told, part, name=""):
    """Return one part of what was told."""
    [found] = [
        entry
        for entry in told["parts"]
        if entry["part"] == part and name in ("", entry["request_class"])
    ]
    return found


@pytest.fixture
def stopped(servers):
    """Return a killed server whose pool "bad" has two regions and has learnt something."""
    server = servers("--log-format", "json")
    with Client(server.target) as service:
        pool = open_pool(service, "bad")
        for i in range(COMPLETIONS):
            answer = pool.apply(ops=[allocate(f"r{i}", 50, request_class="chat")])
            pool.apply(ops=[free(answer.results[0].place.handle, End.FINISHED, 40 + i)])
        pool.apply(ops=[allocate(f"last-{i}", 50) for i in range(2)])
        server.epoch, server.ref = pool.ref.epoch, pool.ref
        server.before = learnt(service, "bad")
    server.kill()
    server.bad = server.pool_dir / "bad.pool"
    return server


def learnt(service, name):
    facts = service.get_pool(name)
    return facts.policy, facts.counters.allocates, list(facts.classes)


def change(path, at, new):
    content = bytearray(path.read_bytes())
    content[at : at + len(new)] = new
    path.write_bytes(content)


def damage_a_region(path):
    """Change one byte of the id of a region in the books, which come last in the file."""
    content = path.read_bytes()
    change(path, content.rindex(b"last-1"), b"L")


def listing(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- repaired and served ---


def test_what_was_learnt_is_served_again_and_the_old_epoch_is_over(stopped):
    damage_a_region(stopped.bad)
    damaged = stopped.bad.read_bytes()
    told = repair(stopped.bad)
    assert told["damage"] == "the sum of the books is wrong"
    assert not told["proven"]
    assert of(told, "histogram", "chat")["kept"] == 1
    assert of(told, "completions", "chat") == {
        "part": "completions",
        "kept": COMPLETIONS,
        "lost": 0,
        "request_class": "chat",
        "why": "",
    }
    assert (of(told, "regions")["kept"], of(told, "regions")["lost"]) == (0, 2)
    aside = stopped.bad.with_name("bad.pool.set-aside-1")
    assert aside.read_bytes() == damaged
    assert "sum of the books" in aside.with_name(f"{aside.name}.reason").read_text()
    stopped.start()
    with Client(stopped.target) as service:
        assert learnt(service, "bad") == stopped.before
        assert service.list_regions("bad") == []
        with pytest.raises(EpochError):
            service.call(service.memory.Apply, apply_of(stopped.ref))
        pool = open_pool(service, "bad")
        assert pool.ref.epoch > stopped.epoch
        assert learnt(service, "bad")[1:] == stopped.before[1:]
        assert pool.apply(ops=[allocate("new", 50)]).seq == 1


def apply_of(ref):
    from odma_service.rpc.v1 import memory_service_pb2 as pb

    return pb.ApplyRequest(pool=ref, seq=1)


def test_a_file_that_a_server_set_aside_is_repaired_into_its_place(stopped):
    damage_a_region(stopped.bad)
    stopped.start()
    aside = stopped.bad.with_name("bad.pool.set-aside-1")
    damaged = aside.read_bytes()
    told = repair(aside)
    assert told["fresh"] == str(stopped.bad)
    assert aside.read_bytes() == damaged
    with Client(stopped.target) as service:  # the server that runs finds it
        assert learnt(service, "bad") == stopped.before
        assert "it is there" in repair(aside, code=2)


def test_a_dry_run_changes_nothing(stopped):
    damage_a_region(stopped.bad)
    before = listing(stopped.pool_dir)
    told = repair(stopped.bad, "--dry-run")
    assert listing(stopped.pool_dir) == before
    assert told["dry_run"]
    assert {**told, "dry_run": False} == repair(stopped.bad)


def test_people_are_told_in_words(stopped):
    damage_a_region(stopped.bad)
    done = run(stopped.bad)
    for words in (
        "the sum of the books is wrong",
        "kept  policy",
        f"kept  completions of class 'chat', {COMPLETIONS}",
        "lost  regions, 2: places are never taken over",
        "not what is proven",
        "every handle of the old books is dead",
        "bad.pool.set-aside-1",
    ):
        assert words in done.stdout


# --- what is not repaired ---


def test_a_file_in_use_is_left_alone(stopped):
    damage_a_region(stopped.bad)
    before = listing(stopped.pool_dir)
    with Arena.create(stopped.bad.with_name("other"), SMALL):
        assert "has it open" in repair(stopped.bad.with_name("other"), code=2)
    stopped.bad.with_name("other").unlink()
    assert listing(stopped.pool_dir) == before


def test_a_sound_file_is_left_alone_unless_told_otherwise(stopped):
    before = stopped.bad.read_bytes()
    assert "it is sound" in repair(stopped.bad, code=2)
    assert stopped.bad.read_bytes() == before
    told = repair(stopped.bad, "--sound")
    assert told["proven"]
    assert told["damage"] is None
    assert [part["part"] for part in told["parts"] if part["lost"]] == ["regions"]
    assert told["pool"] == "bad"


def test_another_layout_version_is_left_alone(stopped):
    change(stopped.bad, 8, (99).to_bytes(4, "little"))
    assert "layout version 99" in repair(stopped.bad, code=2)


@pytest.mark.parametrize("content", [b"", b"text", b"\0" * 100_000, b'{"name":' + b"[" * 9_000])
def test_what_is_no_pool_is_left_alone(tmp_path, content):
    path = tmp_path / "p.pool"
    path.write_bytes(content)
    path.chmod(0o600)
    assert "nothing in it describes a pool" in repair(path, code=2)
    assert listing(tmp_path) == {"p.pool": content}


def test_links_and_files_for_others_are_left_alone(stopped):
    damage_a_region(stopped.bad)
    link = stopped.bad.with_name("link.pool")
    link.symlink_to(stopped.bad)
    repair(link, code=2)
    stopped.bad.chmod(0o640)
    assert "others than its owner" in repair(stopped.bad, code=2)


# --- damage of every kind ---


def test_a_torn_header_is_made_up_for_by_the_description(stopped):
    change(stopped.bad, 0, os.urandom(16) + bytes(4080))
    told = repair(stopped.bad)
    assert of(told, "policy")["kept"] == of(told, "histogram", "chat")["kept"] == 1
    stopped.start()
    with Client(stopped.target) as service:
        assert learnt(service, "bad") == stopped.before


def test_a_description_with_another_name_is_not_believed_if_a_record_knows_better(stopped):
    content = stopped.bad.read_bytes()
    assert content.count(b'{"name":"bad"') == 2  # in the record of OpenPool, and in the books
    change(stopped.bad, content.rindex(b'{"name":"bad"') + 9, b"B")
    assert repair(stopped.bad)["pool"] == "bad"
    stopped.start()
    with Client(stopped.target) as service:
        assert learnt(service, "bad") == stopped.before


def test_a_torn_header_and_another_size_are_too_much(stopped):
    change(stopped.bad, 0, bytes(64))
    os.truncate(stopped.bad, stopped.bad.stat().st_size - 4096)
    assert "its size is another" in repair(stopped.bad, code=2)


def test_a_file_cut_in_its_regions_keeps_what_was_learnt(stopped):
    content = stopped.bad.read_bytes()
    os.truncate(stopped.bad, content.rindex(b"last-0") - 100)
    told = repair(stopped.bad)
    assert "bytes, its geometry needs" in told["damage"]
    stopped.start()
    with Client(stopped.target) as service:
        assert learnt(service, "bad") == stopped.before


def test_a_file_cut_in_its_records_has_nothing_to_keep(stopped):
    os.truncate(stopped.bad, 5_000)
    before = listing(stopped.pool_dir)
    assert "nothing in it can be kept" in repair(stopped.bad, code=1)
    assert listing(stopped.pool_dir) == before


def test_damaged_records_leave_all_that_was_learnt_proven(stopped):
    """An answer that is damaged makes attach refuse; the sum of the books is right."""
    content = stopped.bad.read_bytes()
    size = len(content)
    change(stopped.bad, 4096, bytes(content.index(b"elastic", size // 2) // 4096 * 4096 - 8192))
    told = repair(stopped.bad)
    assert told["proven"]
    assert [part["part"] for part in told["parts"] if part["lost"]] == ["regions"]


@pytest.fixture
def small(tmp_path):
    """Return small books of an engine's own that have learnt, and what they know."""
    path = tmp_path / "p.pool"
    with Arena.create(path, SMALL) as arena:
        arena.set_policy(PolicyRecord("mine", Start.STEP, Overflow.COMPACT, step_tokens=64))
        arena.open_epoch(5, ENGINE, "boot", b"mine")
        for i in range(300):
            ops = [Allocate("a", 20, request_class="chat" if i % 3 else "code")]
            [place] = arena.apply(5, Batch(2 * i + 1, 2 * i, [], ops)).results
            end = End.HIT_LIMIT if i % 7 == 0 else End.FINISHED
            arena.apply(5, Batch(2 * i + 2, 2 * i + 1, [], [Free(place.handle, end, 1 + i)]))
    return path


def salvaged(path, content, least_epoch=0, description=None):
    """Return what came of a damaged content, and the fresh arena."""
    fresh = Arena.create(path.with_name(f"fresh-{random.random()}"), SMALL)
    parts, proven = fresh.salvage(bytes(content), description, least_epoch)
    fresh.check()
    return {(part.part, part.request_class): part for part in parts}, proven, fresh


def test_books_that_are_whole_are_taken_over_whole(small):
    parts, proven, fresh = salvaged(small, small.read_bytes())
    assert proven
    assert [part for part, entry in parts.items() if entry.lost] == []
    with fresh, Arena.attach(small) as old:
        assert fresh.policy() == old.policy()
        assert fresh.report().counters == old.report().counters
        assert (fresh.report().epoch, fresh.report().last_epoch) == (0, 5)
        assert fresh.description() == b"mine"
        assert fresh.class_names() == old.class_names() == ["code", "chat"]
        for index in (0, 1, CLASS_POOL):
            assert fresh.ring(index)[1] == old.ring(index)[1]
            assert (fresh.ring(index)[0] == old.ring(index)[0]).all()
            for one, other in zip(fresh.histogram(index), old.histogram(index), strict=True):
                assert (one == other) if isinstance(one, int) else (one == other).all()


def stats_offset(content):
    """Return where the statistics of the classes begin: a granule after the description's end."""
    return content.rindex(b"mine") - content.rindex(b"mine") % 32 + 8192


STATS_BYTES = 32 + 4 * 512 * 8 + 256 * 88
RING = 32 + 4 * 512 * 8


@pytest.mark.parametrize(
    ("at", "new", "why"),
    [
        (0, struct.pack("d", float("nan")), "its newest weight is impossible"),
        (32, struct.pack("d", -1.0), "a bin is impossible"),
        (32, struct.pack("d", float("inf")), "a bin is impossible"),
        (32, struct.pack("d", 7.0), "outputs and totals disagree"),
        (0, struct.pack("d", 3.0), "its weights do not add up"),
    ],
)
def test_a_histogram_that_cannot_be_is_counted_again_from_its_completions(small, at, new, why):
    content = bytearray(small.read_bytes())
    begin = stats_offset(content)
    content[begin + at : begin + at + 8] = new
    parts, proven, fresh = salvaged(small, content)
    entry = parts[Part.HISTOGRAM, "code"]
    assert not proven
    assert entry.why == f"{why}; counted again from 100 completions"
    assert parts[Part.HISTOGRAM, "chat"].kept == parts[Part.HISTOGRAM, "(pool)"].kept == 1
    with fresh, Arena.attach(small) as old:
        index = fresh.class_index("code")
        again, before = fresh.histogram(index), old.histogram(index)
        assert again.completions == before.completions == 100
        for one, other in zip(again[1:], before[1:], strict=True):
            assert one == pytest.approx(other)


def test_a_completion_that_cannot_be_is_dropped_and_the_rest_kept(small):
    content = bytearray(small.read_bytes())
    at = stats_offset(content) + RING + 3 * 88
    content[at + 60 : at + 64] = (0).to_bytes(4, "little")  # prompt_tokens
    parts, _, fresh = salvaged(small, content)
    entry = parts[Part.COMPLETIONS, "code"]
    assert (entry.kept, entry.lost, entry.why) == (99, 1, "some are impossible")
    with fresh:
        assert len(fresh.completions(fresh.class_index("code"))) == 99


def test_a_policy_that_cannot_be_is_dropped_by_name(small):
    content = bytearray(small.read_bytes())
    at = [i for i in range(len(content)) if content.startswith(b"mine\0", i)][-2]
    content[at + 36 : at + 40] = (9).to_bytes(4, "little")  # start
    parts, _, fresh = salvaged(small, content)
    assert parts[Part.POLICY, ""].why == "start: one of odma_start"
    with fresh:
        assert fresh.policy().name == "static"


def test_without_proof_the_next_epoch_is_beyond_any_that_may_have_been(small):
    content = bytearray(small.read_bytes())
    content[stats_offset(content) - 1] ^= 1  # in the unused end of the description
    _, proven, fresh = salvaged(small, content, least_epoch=1_000)
    with fresh:
        assert not proven
        assert fresh.report().last_epoch == 1_000
        with pytest.raises(OdmaError):
            fresh.open_epoch(1_000, ENGINE, "boot", b"")


def test_wild_bytes_anywhere_leave_fresh_books_that_keep_every_rule(small):
    """Whatever they hit: each is told of as kept or lost, and what is taken over can be."""
    draws, good = random.Random(1), small.read_bytes()
    for i in range(150):
        content = bytearray(good)
        for _ in range(draws.choice((1, 4, 64))):
            content[draws.randrange(len(content))] = draws.randrange(256)
        if i % 5 == 0:
            del content[draws.randrange(len(content)) :]
        parts, _, fresh = salvaged(small, content)
        with fresh:
            assert fresh.report().epoch == 0
            assert {part for part, _ in parts} >= {Part.EPOCH, Part.POLICY, Part.COUNTERS}
            fresh.open_epoch(fresh.report().last_epoch + 1, ENGINE, "boot", b"")
        fresh.path.unlink()


def test_salvage_is_only_for_fresh_books(small):
    content = small.read_bytes()
    with Arena.attach(small) as arena, pytest.raises(OdmaError):
        arena.salvage(content)


# --- death ---

DIE_AT = """
import os, sys
from odma_service.cli import repair as repair_cli
from odma_service.__main__ import main

calls, last = 0, int(sys.argv[1])
def dying(before):
    def call(*args, **more):
        global calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), 9)
        return before(*args, **more)
    return call

from pathlib import Path
os.link, Path.replace, Path.write_text = map(dying, (os.link, Path.replace, Path.write_text))
sys.argv = ["odma", "arena", "repair", sys.argv[2]]
main()
"""


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_repair_that_is_killed_leaves_the_old_file_or_the_new_one_and_can_be_done_again(
    stopped, step
):
    damage_a_region(stopped.bad)
    damaged = stopped.bad.read_bytes()
    command = [sys.executable, "-c", DIE_AT, str(step), str(stopped.bad)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (-signal.SIGKILL if step < 4 else 0), done.stderr
    if step < 4:
        assert stopped.bad.read_bytes() == damaged
        with pytest.raises(BooksCorruptError):
            Arena.attach(stopped.bad)
        repair(stopped.bad)
    aside = stopped.bad.with_name("bad.pool.set-aside-1")
    assert aside.read_bytes() == damaged
    stopped.start()
    assert not list(stopped.pool_dir.glob("*.new"))
    with Client(stopped.target) as service:
        assert learnt(service, "bad") == stopped.before
