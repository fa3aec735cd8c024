"""The demo: its parts alone, then an engine against a real server."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from threading import Event, Thread

import numpy as np
import pytest
from running import odma
from talking import conversations
from typer.testing import CliRunner

from odma_service.cli import app, demo
from odma_service.client import Client
from odma_service.client import local as server
from odma_service.demo.device import Device, Move
from odma_service.demo.play import STEPS, Setting, open_pool, play
from odma_service.demo.remote import RemoteMemory
from odma_service.pool.policy import named
from odma_service.replay.arena import ArenaMemory
from odma_service.replay.load import Limits, load_of
from odma_service.replay.loop import serve
from odma_service.replay.pooled import EngineKind
from odma_service.replay.predict import predictor
from odma_service.replay.prices import Serving
from odma_service.traces import generate, write_trace
from odma_service.values import Copy, Moves

KEYS = {
    "policy",
    "requests",
    "finished",
    "never_fit",
    "refusals",
    "preempted",
    "tokens_generated",
    "tokens_expected",
    "tokens_checked",
    "prompt_tokens",
    "reused_tokens",
    "violations",
    "utilisation_written_over_capacity",
    "utilisation_written_over_reserved",
    "copies",
    "copied_tokens",
    "relocations",
    "compactions",
    "apply_p50_us",
    "apply_p99_us",
    "balanced",
}
POLICIES = ("static", "s3", "odma", "elastic")
SMALL = Limits(max_output_tokens=256, model_length_tokens=1_024, capacity_tokens=4_096)
FLAGS = ("--capacity-tokens", "4096", "--max-output", "256", "--model-length", "1024")


# The device memory


def device(**others):
    return Device(64, **({"ordered": True, "may_overlap": True} | others))


def copy(from_token, to_token, tokens, handle=0, overlaps=False):
    return Copy(handle, from_token, to_token, tokens, overlaps)


def one_move(memory, copies, to_token):
    memory.write(7, 0, 0, 8)
    memory.run(1, copies, {0})
    memory.move(1, [Move(7, 0, to_token, 8)])
    memory.check()
    return memory.violations


def test_a_moved_region_is_found_at_its_new_place():
    memory = device()
    assert one_move(memory, [copy(0, 32, 8)], 32) == 0
    assert (memory.copies, memory.copied_tokens, memory.tokens_checked) == (1, 8, 8)


def test_a_copy_may_overlap_its_own_source():
    assert one_move(device(), [copy(0, 3, 8, overlaps=True)], 3) == 0


def test_an_overlapping_copy_is_a_violation_where_the_engine_cannot_do_it():
    moved = copy(0, 3, 8, overlaps=True)
    assert one_move(device(may_overlap=False), [moved], 3) == 1


def test_a_copy_that_hides_its_overlap_is_a_violation():
    assert one_move(device(), [copy(0, 3, 8)], 3) == 1


def test_every_token_of_a_dropped_copy_is_missed():
    moved = copy(0, 32, 8)
    assert one_move(device(drop_copy=1), [moved], 32) == 8
    assert one_move(device(drop_copy=2), [moved], 32) == 0


def test_a_region_that_may_not_move_must_not_be_copied():
    assert one_move(device(), [copy(0, 32, 8, handle=5)], 32) == 1


def test_a_copy_that_leaves_the_memory_is_a_violation():
    assert one_move(device(), [copy(0, 60, 8)], 0) == 1


def test_a_token_that_another_request_overwrites_is_missed():
    memory = device()
    memory.write(7, 0, 0, 8)
    memory.run(1, [copy(40, 4, 2)], {0})
    memory.check()
    assert memory.violations == 2


def test_regions_that_share_a_token_or_leave_the_memory_are_violations():
    memory = device()
    memory.check_regions(np.array([16, 0, 40]), np.array([16, 16, 24]))
    assert memory.violations == 0
    memory.check_regions(np.array([16, 0, 40]), np.array([16, 17, 25]))
    assert memory.violations == 2


def test_tokens_of_decode_steps_are_checked_like_those_of_a_prefill():
    memory = device()
    memory.write(1, 0, 0, 4)
    memory.write(2, 16, 0, 4)
    memory.write(1, 0, 4, 6)
    memory.write(2, 16, 4, 5)
    memory.run(1, [copy(16, 32, 5)], {0})
    memory.move(1, [Move(2, 16, 32, 5)])
    memory.check()
    assert (memory.violations, memory.tokens_checked) == (0, 11)


def test_a_token_written_over_a_live_one_is_a_violation():
    memory = device()
    memory.write(1, 0, 0, 4)
    memory.write(2, 3, 0, 4)
    assert memory.violations == 1


def test_with_several_streams_a_vacated_run_is_kept_until_it_is_completed():
    memory = device(ordered=False)
    memory.write(1, 0, 0, 8)
    memory.vacate(3, 0, 8)
    memory.complete(2)
    memory.write(2, 6, 0, 4)
    memory.check()
    assert memory.violations == 2
    memory.complete(3)
    memory.check()
    assert memory.violations == 2


def test_with_several_streams_a_copy_must_not_need_an_earlier_one():
    chain = [copy(0, 16, 8), copy(16, 32, 8)]
    assert one_move(device(), chain, 32) == 0
    assert one_move(device(ordered=False), chain, 32) > 0


# Against a real server


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    process, address = server.start(tmp_path_factory.mktemp("server"))
    yield address
    server.stop(process)


@pytest.fixture(scope="module")
def unmodelled(tmp_path_factory):
    """Run a server that predicts from lengths alone."""
    flags = ("--predictor-model", "none")
    process, address = server.start(tmp_path_factory.mktemp("unmodelled"), flags=flags)
    yield address
    server.stop(process)


@pytest.fixture
def trace_file(tmp_path):
    """Write 40 requests: two that can never fit, three that meet their limit."""
    lengths = [(20 + 13 * i % 300, 10 + 37 * i % 240) for i in range(35)]
    lengths += [(1_024, 5), (4_000, 5), (50, 257), (900, 125), (1_000, 300)]
    path = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 0, "input_length": a, "output_length": b} for a, b in lengths]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)])


def outcome_of(result):
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("moves", "single_stream", "copies_may_overlap"),
    list(product(Moves, (True, False), (True, False))),
)
def test_every_kind_of_engine_keeps_every_token(
    target, policy, moves, single_stream, copies_may_overlap
):
    setting = Setting(SMALL, EngineKind(moves, single_stream, copies_may_overlap))
    with Client(target) as service:
        outcome = play(service, generate(40, 3), policy, setting, lambda history: None)
    assert outcome.flaws() == []
    assert outcome.refusals > 0
    assert outcome.copies == 0 or moves is not Moves.NONE


@pytest.mark.parametrize("streams", ["single", "several"])
def test_what_is_reused_is_checked_as_what_is_written(target, tmp_path, streams):
    path = tmp_path / "conversations.parquet"
    write_trace(conversations(10, 6, 2, common_blocks=4), path)
    options = ("--trace", path, "--target", target, "--policy", "elastic", "--json", *FLAGS)
    several = ("--streams", streams, "--no-overlap", "--model-length", "4096")
    outcome = outcome_of(run(*options, *several, "--granule-tokens", "64"))
    assert (outcome["violations"], outcome["balanced"]) == (0, True)
    assert 0 < outcome["reused_tokens"] < outcome["prompt_tokens"]
    assert outcome_of(run(*options, *several))["reused_tokens"] == 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("single_stream", [True, False])
def test_a_pool_behind_a_server_gives_what_the_replay_says(
    unmodelled, policy, single_stream, tmp_path
):
    kind = EngineKind(single_stream=single_stream, copies_may_overlap=single_stream)
    setting = Setting(Limits(1_000, 4_096, 12_000), kind)
    load = load_of(generate(150, 3), setting.limits)
    record = named(policy, 4_096, 12_000, slides=single_stream)
    live = predictor("live", load, 0)
    with ArenaMemory(tmp_path, setting.limits, Serving(), record, kind, live) as memory:
        replayed = serve(load, memory, STEPS, overtake=4)
    with Client(unmodelled) as service:
        pool = open_pool(service, policy, setting)
        device = Device(12_000, ordered=single_stream, may_overlap=single_stream)
        remote = RemoteMemory(pool, device, record, kind)
        served = serve(load, remote, STEPS, overtake=4)
        pool.close_pool()
    # Another policy in force is seen by the batch after it only, which may ask once more.
    assert replace(served, decisions=0) == replace(replayed, decisions=0)
    assert device.violations == 0


def test_requests_that_wait_for_answers_come_after_them(target):
    trace = conversations(8, 5, 2)
    setting = Setting(Limits(300, 4_096, 4_096))
    with Client(target) as service:
        outcome = play(service, trace, "elastic", setting, lambda history: None)
    assert outcome.flaws() == []
    assert (outcome.finished, outcome.reused_tokens) == (40, 0)
    at_once = replace(trace, waits=None)
    with Client(target) as service:
        assert play(service, at_once, "elastic", setting, lambda _: None).steps < outcome.steps


def test_a_lone_request_that_cannot_grow_starts_again_elsewhere(target):
    """One region at the end of the memory, none that may move, and nobody else to preempt."""
    setting = Setting(Limits(1_500, 5_000, 12_000), EngineKind(moves=Moves.NONE))
    with Client(target) as service:
        outcome = play(service, generate(60, 1), "s3", setting, lambda history: None)
    assert outcome.flaws() == []


def test_younger_requests_may_pass_one_that_waits(target, tmp_path):
    """The third needs nearly all of the pool; its followers fit beside the first two."""
    lengths = [(1_400, 200), (1_400, 200), (3_800, 4)] + [(30, 40)] * 40
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 0, "input_length": a, "output_length": b} for a, b in lengths]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ("--capacity-tokens", "4096", "--max-output", "256", "--model-length", "4096")
    options = ("--trace", path, "--target", target, "--policy", "elastic", "--json", *sizes)
    waiting, passing = (run(*options, *more) for more in ((), ("--overtake", "4")))
    assert (waiting.exit_code, passing.exit_code) == (0, 0)
    slow, fast = outcome_of(waiting), outcome_of(passing)
    assert slow["finished"] == fast["finished"] == 43
    assert fast["steps"] < slow["steps"]


def test_the_json_has_what_was_promised(target, trace_file):
    result = run("--trace", trace_file, "--target", target, "--policy", "elastic", "--json", *FLAGS)
    assert result.exit_code == 0
    outcome = outcome_of(result)
    assert outcome.keys() >= KEYS
    assert outcome["policy"] == "elastic"
    assert (outcome["requests"], outcome["finished"], outcome["never_fit"]) == (40, 38, 2)
    assert outcome["tokens_generated"] == outcome["tokens_expected"]
    assert outcome["tokens_checked"] > outcome["tokens_generated"]
    assert outcome["violations"] == 0
    assert outcome["balanced"] is True


def test_several_policies_are_a_list(target, trace_file):
    names = "static,elastic"
    result = run("--trace", trace_file, "--target", target, "--policy", names, "--json", *FLAGS)
    assert result.exit_code == 0
    assert [o["policy"] for o in outcome_of(result)["policies"]] == ["static", "elastic"]


def test_a_table_shows_the_policies_side_by_side(target, trace_file):
    result = run("--trace", trace_file, "--target", target, "--policy", "s3,odma", *FLAGS)
    assert result.exit_code == 0
    for word in ("s3", "odma", "refusals", "preemptions", "violations", "call p50"):
        assert word in result.stdout


def test_a_dropped_copy_is_seen(target, trace_file):
    options = ("--trace", trace_file, "--target", target, "--policy", "elastic", "--json", *FLAGS)
    result = run(*options, "--drop-copy", "3")
    assert result.exit_code == 1
    assert outcome_of(result)["violations"] > 0
    assert "not as the books say" in result.stderr


def test_a_load_that_its_user_made_small_need_not_be_short_of_memory(target):
    result = run("--rows", "2", "--target", target, "--policy", "elastic", "--json")
    assert result.exit_code == 0
    assert outcome_of(result)["utilisation_written_over_capacity"] is None


def test_a_load_made_to_be_short_of_memory_that_was_not_is_a_bad_result(target, monkeypatch):
    monkeypatch.setattr(demo, "SYNTHETIC_ROWS", 2)
    result = run("--target", target, "--policy", "elastic", "--json")
    assert result.exit_code == 1
    assert "elastic: no refusals" in result.stderr


def test_a_trace_of_which_nothing_fits_is_refused_as_by_the_replay(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps({"timestamp": 0, "input_length": 200_000, "output_length": 5}))
    for command in ("demo --trace", "replay"):
        result = CliRunner().invoke(app, [*command.split(), str(path)])
        assert result.exit_code == 2
        assert result.stdout == ""
        assert "no request of the trace can ever fit: the shortest prompt has 200,000 tokens" in (
            result.stderr
        )


def test_a_server_of_its_own_is_started_and_stopped(trace_file):
    done = odma("demo", "--trace", trace_file, "--json", *FLAGS)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])["policies"]
    assert [outcome["finished"] for outcome in outcomes] == [38, 38, 38]


@pytest.mark.parametrize("arguments", [["--policy", "best"], ["--trace", "no-such-file"]])
def test_what_cannot_be_played_is_refused(arguments):
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("single_stream", [True, False])
def test_an_engine_outlives_its_server(tmp_path, single_stream):
    process, address = server.start(tmp_path)
    moments = {200: Event(), 400: Event(), 600: Event()}

    def kill_and_restart():
        nonlocal process
        for moment in moments.values():
            moment.wait()
            process.kill()
            process.communicate()
            process, _ = server.start(tmp_path, address)

    def watch(history):
        for steps, moment in moments.items():
            if history.steps >= steps:
                moment.set()

    killer = Thread(target=kill_and_restart, daemon=True)
    killer.start()
    setting = Setting(SMALL, EngineKind(single_stream=single_stream))
    try:
        with Client(address) as service:
            outcome = play(service, generate(40, 3), "elastic", setting, watch)
        assert outcome.steps > max(moments)
        assert outcome.flaws() == []
        killer.join()
    finally:
        server.stop(process)
