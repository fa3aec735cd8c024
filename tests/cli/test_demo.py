"""The demo: its parts alone, then an engine against a real server."""

from __future__ import annotations

import json
from itertools import product
from threading import Event, Thread

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from running import odma
from typer.testing import CliRunner

from odma_service.cli import app
from odma_service.client import Client
from odma_service.client import local as server
from odma_service.demo.device import Device, Move
from odma_service.demo.load import Limits, Request, requests_of
from odma_service.demo.play import EngineKind, play
from odma_service.demo.running import Running
from odma_service.rpc.v1.types_pb2 import Copy
from odma_service.traces import generate
from odma_service.values import Moves

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
SMALL = {"capacity_tokens": 4_096, "max_output_tokens": 256, "model_length_tokens": 1_024}
FLAGS = ("--capacity-tokens", "4096", "--max-output", "256", "--model-length", "1024")


# What the engine is asked to do


def test_a_request_stops_at_the_first_limit_it_meets():
    limits = Limits(max_output_tokens=100, model_length_tokens=1_000, capacity_tokens=5_000)
    assert limits.maximum(10) == 110
    assert limits.maximum(950) == 1_000
    assert limits.maximum(999) == 1_000


def test_a_prompt_that_leaves_no_room_for_an_answer_never_fits():
    assert Limits(100, 1_000, 5_000).maximum(1_000) is None


def test_a_request_whose_maximum_exceeds_the_pool_never_fits():
    limits = Limits(max_output_tokens=100, model_length_tokens=1_000, capacity_tokens=500)
    assert limits.maximum(400) == 500
    assert limits.maximum(401) is None


def test_requests_keep_their_prompts_and_their_places_in_the_trace():
    trace = generate(50, 1, max_output_tokens=4_096)
    limits = Limits(max_output_tokens=300, model_length_tokens=2_000, capacity_tokens=1_500)
    requests = requests_of(trace, limits)
    assert 0 < len(requests) < 50
    for request in requests:
        prompt, output = trace.input_tokens[request.number], trace.output_tokens[request.number]
        assert request.prompt_tokens == prompt
        assert request.output_tokens == min(output, 300)
        assert request.limited == (output > 300)
        assert request.request_class == trace.request_class[request.number]


class RunningAgainstDict(RuleBasedStateMachine):
    """The columns of the running requests and a plain dict never disagree."""

    @initialize()
    def start(self):
        self.running, self.model, self.handle = Running(8), {}, 0

    @rule(start=st.integers(0, 9), length=st.integers(1, 9))
    def add(self, start, length):
        if len(self.model) < 8:
            self.handle += 1
            request = Request(self.handle, 5, 7, 9, False, "")
            self.running.add(request, self.handle, start, length)
            self.model[self.handle] = [request, start, length]

    @rule(data=st.data(), start=st.integers(0, 9), length=st.integers(1, 9))
    def place(self, data, start, length):
        if self.model:
            handle = data.draw(st.sampled_from(sorted(self.model)))
            self.running.place(self.running.entry(handle), start, length)
            self.model[handle][1:] = [start, length]

    @rule(data=st.data())
    def remove(self, data):
        if self.model:
            handle = data.draw(st.sampled_from(sorted(self.model)))
            self.running.remove(self.running.entry(handle))
            del self.model[handle]

    @invariant()
    def they_agree(self):
        running = self.running
        regions = zip(running.requests, running.starts, running.lengths, strict=True)
        assert dict(zip(running.handles, map(list, regions), strict=True)) == self.model
        assert running.numbers.tolist() == [request.number for request in running.requests]


TestRunning = RunningAgainstDict.TestCase


# The device memory


def device(**others):
    return Device(64, **({"ordered": True, "may_overlap": True} | others))


def one_move(memory, copies, to_token):
    memory.fill(7, 0, 8)
    memory.run(copies, {0})
    memory.move(1, [Move(7, 0, to_token, 8)])
    memory.check()
    return memory.violations


def test_a_moved_region_is_found_at_its_new_place():
    memory = device()
    assert one_move(memory, [Copy(from_token=0, to_token=32, tokens=8)], 32) == 0
    assert (memory.copies, memory.copied_tokens, memory.tokens_checked) == (1, 8, 8)


def test_a_copy_may_overlap_its_own_source():
    assert one_move(device(), [Copy(from_token=0, to_token=3, tokens=8, overlaps=True)], 3) == 0


def test_an_overlapping_copy_is_a_violation_where_the_engine_cannot_do_it():
    copy = Copy(from_token=0, to_token=3, tokens=8, overlaps=True)
    assert one_move(device(may_overlap=False), [copy], 3) == 1


def test_a_copy_that_hides_its_overlap_is_a_violation():
    assert one_move(device(), [Copy(from_token=0, to_token=3, tokens=8)], 3) == 1


def test_every_token_of_a_dropped_copy_is_missed():
    copy = Copy(from_token=0, to_token=32, tokens=8)
    assert one_move(device(drop_copy=1), [copy], 32) == 8
    assert one_move(device(drop_copy=2), [copy], 32) == 0


def test_a_region_that_may_not_move_must_not_be_copied():
    assert one_move(device(), [Copy(handle=5, from_token=0, to_token=32, tokens=8)], 32) == 1


def test_a_copy_that_leaves_the_memory_is_a_violation():
    assert one_move(device(), [Copy(from_token=0, to_token=60, tokens=8)], 0) == 1


def test_a_token_that_another_request_overwrites_is_missed():
    memory = device()
    memory.fill(7, 0, 8)
    memory.run([Copy(from_token=40, to_token=4, tokens=2)], {0})
    memory.check()
    assert memory.violations == 2


def test_regions_that_share_a_token_or_leave_the_memory_are_violations():
    memory = device()
    memory.check_regions(np.array([16, 0, 40]), np.array([16, 16, 24]))
    assert memory.violations == 0
    memory.check_regions(np.array([16, 0, 40]), np.array([16, 17, 25]))
    assert memory.violations == 2


def test_appended_tokens_are_checked_like_those_of_a_prefill():
    memory = device()
    memory.fill(1, 0, 4)
    memory.fill(2, 16, 4)
    memory.append(np.array([1, 2]), np.array([0, 16]), np.array([4, 4]))
    memory.run([Copy(from_token=16, to_token=32, tokens=5)], {0})
    memory.move(1, [Move(2, 16, 32, 5)])
    memory.check()
    assert (memory.violations, memory.tokens_checked) == (0, 10)


def test_with_several_streams_a_vacated_run_is_kept_until_it_is_completed():
    memory = device(ordered=False)
    memory.fill(1, 0, 8)
    memory.vacate(3, 0, 8)
    memory.complete(2)
    memory.fill(2, 6, 4)
    memory.check()
    assert memory.violations == 2
    memory.complete(3)
    memory.check()
    assert memory.violations == 2


def test_with_several_streams_a_copy_must_not_need_an_earlier_one():
    chain = [Copy(from_token=0, to_token=16, tokens=8), Copy(from_token=16, to_token=32, tokens=8)]
    assert one_move(device(), chain, 32) == 0
    assert one_move(device(ordered=False), chain, 32) > 0


# Against a real server


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    process, address = server.start(tmp_path_factory.mktemp("server"))
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
    kind = EngineKind(
        moves=moves, single_stream=single_stream, copies_may_overlap=copies_may_overlap, **SMALL
    )
    with Client(target) as service:
        outcome = play(service, generate(40, 3), policy, kind, lambda tally: None)
    assert outcome.flaws() == []
    assert outcome.refusals > 0
    assert outcome.copies == 0 or moves is not Moves.NONE


def test_a_lone_request_that_cannot_grow_starts_again_elsewhere(target):
    """One region at the end of the memory, none that may move, and nobody else to preempt."""
    sizes = {"capacity_tokens": 12_000, "max_output_tokens": 1_500, "model_length_tokens": 5_000}
    kind = EngineKind(moves=Moves.NONE, **sizes)
    with Client(target) as service:
        outcome = play(service, generate(60, 1), "s3", kind, lambda tally: None)
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


def test_a_synthetic_load_that_is_not_short_of_memory_proves_nothing(target):
    result = run("--rows", "2", "--target", target, "--policy", "elastic", "--json")
    assert result.exit_code == 1
    assert "elastic: no refusals" in result.stderr
    assert outcome_of(result)["utilisation_written_over_capacity"] is None


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

    def watch(tally):
        if tally.steps in moments:
            moments[tally.steps].set()

    killer = Thread(target=kill_and_restart, daemon=True)
    killer.start()
    kind = EngineKind(single_stream=single_stream, **SMALL)
    try:
        with Client(address) as service:
            outcome = play(service, generate(40, 3), "elastic", kind, watch)
        assert outcome.steps > max(moments)
        assert outcome.flaws() == []
        killer.join()
    finally:
        server.stop(process)
