"""`odma arena`: an operator looks into a file, and the file stays as it is."""

from __future__ import annotations

import json
import os

import pytest
from registries import Clock, open_in, registry_of
from running import odma

from odma_service._native import Arena, ArenaGeometry, EngineRecord, PolicyRecord
from odma_service.values import Allocate, Batch, End, Free, Moves, Overflow, Start

GEOMETRY = ArenaGeometry(256, 16, 64, 16, 64, 2048, 7)
ENGINE = EngineRecord(Moves.ANY, False, True, 2, 1e-6, 1e-7)
POLICY = PolicyRecord("elastic", Start.STEP, Overflow.COMPACT, step_tokens=64)


def odma_arena(command, path, *flags, code=0):
    """Run a command that leaves the file as it is, and return what it says."""
    before = path.read_bytes() if path.is_file() else None
    run = odma("arena", command, path, *flags)
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr
    assert before is None or path.read_bytes() == before
    return run.stdout if code == 0 else run.stderr


@pytest.fixture
def file(tmp_path):
    """Return books with two regions and a run that waits."""
    path = tmp_path / "p.pool"
    with Arena.create(path, GEOMETRY) as arena:
        arena.set_policy(POLICY)
        arena.open_epoch(5, ENGINE, "another boot", b"mine")
        ops = [Allocate(name, 100, request_class="chat") for name in "abc"]
        handles = [place.handle for place in arena.apply(5, Batch(1, 0, [], ops)).results]
        arena.apply(5, Batch(2, 1, [], [Free(handles[1], End.FINISHED, 60)]))
    return path


def test_good_books_are_ok(file):
    assert odma_arena("check", file) == "ok: 2 regions, epoch 5, seq 2\n"


def test_several_files_are_checked_and_a_broken_one_hides_none(file):
    good = file.with_name("good.pool")
    good.write_bytes(file.read_bytes())
    good.chmod(0o600)
    content = bytearray(file.read_bytes())
    content[content.rindex(b"chat")] ^= 1
    file.write_bytes(content)
    ran = odma("arena", "check", file, good)
    assert (ran.returncode, ran.stdout) == (1, f"{good}: ok: 2 regions, epoch 5, seq 2\n")
    assert str(file) in ran.stderr


def test_a_closed_pool_is_said_to_be_closed_and_what_its_owner_could(tmp_path):
    registry = registry_of(tmp_path, Clock())
    epoch = open_in(registry, "p", single_ordered_stream=True).epoch
    registry.close_epoch("p", epoch)
    registry.close()
    assert (
        odma_arena("check", tmp_path / "p.pool") == f"ok: 0 regions, closed, epoch {epoch}, seq 0\n"
    )
    assert "moves any, one ordered stream" in odma_arena("dump", tmp_path / "p.pool")


def test_a_file_that_is_open_is_checked_too_and_said_to_be(file):
    with Arena.attach(file):
        told = odma_arena("check", file)
        assert json.loads(odma_arena("dump", file, "--json"))["in_use"]
    assert "ok: 2 regions" in told
    assert "a process has it open" in told


def test_a_broken_rule_is_exit_code_1(file):
    content = bytearray(file.read_bytes())
    content[content.rindex(b"chat")] ^= 1
    file.write_bytes(content)
    assert "the sum of the books is wrong" in odma_arena("check", file, code=1)
    assert "the sum of the books is wrong" in odma_arena("dump", file, code=1)


@pytest.mark.parametrize("size", [0, 100, 4096, 100_000])
def test_a_truncated_file_is_exit_code_1(file, size):
    os.truncate(file, size)
    assert str(file) in odma_arena("check", file, code=1)


def test_another_layout_version_is_exit_code_2(file):
    content = bytearray(file.read_bytes())
    content[8:12] = (99).to_bytes(4, "little")
    file.write_bytes(content)
    assert f"odma arena check: {file}: it has layout version 99" in odma_arena(
        "check", file, code=2
    )


def test_a_file_for_others_is_exit_code_2(file):
    file.chmod(0o640)
    assert "others than its owner may use it (mode 640)" in odma_arena("check", file, code=2)


def test_what_is_no_file_is_exit_code_2(file, tmp_path):
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(file)
    os.mkfifo(pipe, 0o600)
    for path in (tmp_path, link, pipe, tmp_path / "nothing"):
        assert str(path) in odma_arena("check", path, code=2)


def test_a_dump_is_all_that_is_in_it(file):
    told = json.loads(odma_arena("dump", file, "--json"))
    assert told["geometry"] == GEOMETRY._asdict()
    assert (told["epoch"], told["seq"], told["recovery"]) == (5, 2, "CLEAN")
    assert told["description"] == "mine"
    assert told["engine"]["moves"] == Moves.ANY
    assert told["policy"]["name"] == "elastic"
    assert told["counters"]["allocates"] == 3
    assert [region["request_id"] for region in told["regions"]] == ["a", "", "c"]
    assert [region["awaits_seq"] for region in told["regions"]] == [0, 2, 0]
    assert [entry["name"] for entry in told["classes"]] == ["(pool)", "chat"]
    assert told["classes"][1]["completions"] == 1


def test_a_dump_is_a_picture_for_people(file):
    told = odma_arena("dump", file)
    assert "p.pool" in told
    assert "█ used" in told
    assert "seq 2" in told


def test_a_commit_that_was_cut_short_is_told_and_left(file):
    """A record begins with its commit word; its lsn is the third word."""
    content = bytearray(file.read_bytes())
    records = [
        at
        for at in range(4096, len(content), 4096)
        if content[at : at + 8] == content[at + 16 : at + 24] != bytes(8)
    ]
    content[records[1] : records[1] + 8] = bytes(8)  # the other batch than the last
    file.write_bytes(content)
    assert "half done: a commit was cut short" in odma_arena("check", file)
    assert json.loads(odma_arena("dump", file, "--json"))["recovery"] == "DROPPED"
