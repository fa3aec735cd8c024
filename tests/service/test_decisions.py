"""The decision log: one record for each request, nothing of its text, a trace for the replay."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import DOCS
from running import fail_to_serve, run
from servers import open_pool, wait_for

from odma_service.client import Client
from odma_service.client.local import ODMA
from odma_service.errors import OdmaError
from odma_service.pool import Pool, PoolSpec
from odma_service.pool.geometry import Geometry
from odma_service.pool.policy import named
from odma_service.service.watch import decisions
from odma_service.service.watch.decisions import REQUEST_START, DecisionLog, RotatedFile
from odma_service.traces import TraceError, read_trace
from odma_service.values import (
    Allocate,
    End,
    Extend,
    Free,
    Freed,
    Moves,
    Place,
    PlaneGroup,
    PolicyChange,
    Refusal,
)

PAGE = DOCS / "reference" / "decision-log.md"
KEYS = b"one granule long"
SECRET = "my mother's maiden name is Szymborska"


@pytest.fixture
def log(tmp_path):
    return tmp_path / "decisions.jsonl"


@pytest.fixture
def logging_server(servers, log):
    return servers("--decision-log", str(log), "--log-level", "debug", "--log-format", "json")


def records(log: Path, count: int) -> list[dict]:
    """Return the records of a log once there are so many."""
    wait_for(lambda: log.read_text().count("\n") >= count, f"{count} records")
    found = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(found) == count
    return found


def test_a_request_is_one_record_with_all_that_was_decided_about_it(logging_server, log, name):
    with Client(logging_server.target) as service:
        pool = open_pool(service, name, policy=PolicyChange(name="elastic", safety_share=0))
        answer = pool.apply(
            ops=[
                Allocate("long", 2000, request_class="chat", tenant="t", max_total_tokens=4000),
                Allocate("other", 1900),
                Allocate("late", 500, predicted_output_tokens=9, overflow_risk=0.2),
            ]
        )
        long, other = (answer.results[i].handle for i in range(2))
        assert isinstance(answer.results[2], Refusal)
        pool.apply(ops=[Extend(long, 2200)])
        pool.apply(ops=[Free(other, End.FINISHED, 7)])
        pool.apply(ops=[Extend(long, 2200), Allocate("late", 500, predicted_output_tokens=9)])
        pool.apply(ops=[Free(long, End.HIT_LIMIT, 2000)])
    first, second = records(log, 2)
    assert first["request_id"] == "other"
    assert (first["prompt_tokens"], first["output_tokens"], first["end"]) == (1900, 7, "FINISHED")
    assert first["asked"] == first["granted"] < first["ended"]
    assert (second["pool"], second["request_class"], second["tenant"]) == (name, "chat", "t")
    assert second["max_total_tokens"] == 4000
    assert second["refusals"] == {"EXTEND_NO_SPACE": 1}
    assert second["extends"] == 1
    assert 2000 < second["granted_tokens"] < second["last_tokens"]
    assert (second["end"], second["output_tokens"]) == ("HIT_LIMIT", 2000)
    assert set(second) == set(documented())


def documented() -> list[str]:
    """Return the fields that the page describes."""
    rows = PAGE.read_text().partition("| --- | --- |")[2].partition("\n\n")[0]
    cells = [row.split("|")[1] for row in rows.strip().splitlines()]
    return [field.strip(" `") for cell in cells for field in cell.split(",")]


def test_a_preempted_request_is_one_record_that_counts_from_its_first_asking(
    logging_server, log, name
):
    with Client(logging_server.target) as service:
        pool = open_pool(service, name)
        first = pool.allocate(Allocate("r", 100))
        pool.free(Free(first.handle, End.PREEMPTED, 20))
        second = pool.allocate(Allocate("r", 100, generated_tokens=20))
        pool.free(Free(second.handle, End.FINISHED, 50))
    [record] = records(log, 1)
    assert (record["preemptions"], record["output_tokens"]) == (1, 50)
    assert record["generated_before_tokens"] == 0


def test_what_a_request_reused_is_in_its_record_and_its_keys_are_not_even_noted(
    logging_server, log, name
):
    with Client(logging_server.target) as service:
        pool = open_pool(service, name, granule_tokens=64)
        for request in ("first", "again", "other"):
            keys = KEYS if request != "other" else KEYS[::-1]
            place = pool.allocate(Allocate(request, 100, keys=keys))
            pool.free(Free(place.handle, End.FINISHED, 28, keep_tokens=128, keys=KEYS))
    found = {record["request_id"]: record["reused_tokens"] for record in records(log, 3)}
    assert found == {"first": 0, "again": 64, "other": 0}
    assert KEYS.decode() not in log.read_text()


def test_a_waiting_note_holds_no_keys(tmp_path):
    notes = DecisionLog(tmp_path / "log", 1 << 20)
    notes.close()  # nothing is read any more
    pool = SimpleNamespace(spec=SimpleNamespace(name="p"), epoch=1)
    ops = [Allocate("r", 100, keys=KEYS), Free(1, End.FINISHED, keep_tokens=64, keys=KEYS)]
    notes.decided(pool, ops, None, [Place(1, 0, 128), Freed()], [])
    [noted] = notes._noted
    assert [op.keys for op in noted.ops] == [b"", b""]


def test_what_was_predicted_is_in_the_record(logging_server, log, name):
    with Client(logging_server.target) as service:
        change = PolicyChange(name="odma", limits_tokens=[4096])
        pool = open_pool(service, name, policy=change)
        place = pool.allocate(Allocate("r", 100, predicted_output_tokens=77))
        pool.free(Free(place.handle, End.FINISHED, 50))
    [record] = records(log, 1)
    assert len(record["quantiles_tokens"]) == 7
    assert record["guess_tokens"] == 77


def test_requests_whose_epoch_ends_or_that_are_reconciled_away_are_told_so(
    logging_server, log, name
):
    with Client(logging_server.target) as service:
        pool = open_pool(service, name)
        kept, dropped = (pool.allocate(Allocate(f"r{i}", 100)).handle for i in range(2))
        pool.apply(ops=[Allocate("never", 4096), Allocate("never", 4096)])
        pool.reconcile([kept])
        pool.close_pool()
    ends = {record["request_id"]: record["end"] for record in records(log, 3)}
    assert ends == {"r1": "RECONCILED", "r0": "EPOCH_OVER", "never": "NOT_GRANTED"}
    assert dropped


def test_a_text_is_in_no_file_and_no_log_line(logging_server, log, name):
    with Client(logging_server.target) as service:
        pool = open_pool(service, name)
        answer = pool.apply(ops=[Allocate("r", 100, text=SECRET), Allocate("s", 9999, text=SECRET)])
        pool.apply(ops=[Free(answer.results[0].handle, End.FINISHED, 5)])
        place = pool.allocate(Allocate("u", 100, text=SECRET))
        pool.free(Free(place.handle, End.FINISHED, 5))
    assert records(log, 2)[0]["with_text"] is True
    assert logging_server.terminate() == 0
    for file in log.parent.rglob("*"):
        if file.is_file():
            assert b"Szymborska" not in file.read_bytes(), file


def test_a_request_that_a_restart_interrupts_has_a_record_all_the_same(logging_server, log, name):
    with Client(logging_server.target) as service:
        pool = open_pool(service, name)
        handle = pool.allocate(Allocate("r", 100, request_class="chat")).handle
        logging_server.restart()
        pool.free(Free(handle, End.FINISHED, 50))
    [record] = records(log, 1)
    assert (record["request_id"], record["request_class"]) == ("r", "chat")
    assert (record["prompt_tokens"], record["output_tokens"]) == (100, 50)
    assert record["asked"] is None


def test_the_log_is_its_owners_alone(logging_server, log, name):
    with Client(logging_server.target) as service:
        pool = open_pool(service, name)
        pool.free(Free(pool.allocate(Allocate("r", 100)).handle, End.FINISHED, 5))
    records(log, 1)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_a_log_that_another_server_writes_ends_the_second_in_one_line(
    logging_server, log, tmp_path
):
    address = ("--listen", "127.0.0.1:0", "--pool-dir", tmp_path / "p2", "--metrics-listen", "")
    told = fail_to_serve(*address, "--decision-log", log)
    assert told == f"odma serve: cannot write the decision log {log}: another server writes it\n"


# --- the file ---


def test_a_full_file_is_rotated_and_the_oldest_is_removed(log):
    file = RotatedFile(log, 100)
    for i in range(20):
        file.write([f"{i}".rjust(59) + "\n"])
    file.close()
    kept = [log, *(Path(f"{log}.{i}") for i in range(1, 8))]
    assert [int(path.read_text()) for path in kept] == list(range(19, 11, -1))
    assert set(log.parent.iterdir()) == set(kept)


WHOLE = f"{REQUEST_START}...}}\n"


@pytest.mark.parametrize(
    ("whole", "torn"),
    [
        ("", ""),
        ("", WHOLE[:1]),
        ("", WHOLE[:-1]),
        (WHOLE, ""),
        (WHOLE * 2, WHOLE[:-1]),
        (WHOLE * 100_000, "\0" * 100),
    ],
)
def test_a_torn_last_line_is_cut_off(log, whole, torn):
    log.write_text(whole + torn)
    file = RotatedFile(log, len(whole) + 100)
    file.write(["{}\n"])
    file.close()
    assert log.read_text() == f"{whole}{{}}\n"


@pytest.mark.parametrize("content", ["x" * 5_004, '{"a": 1}', "a\n\nb", f"{WHOLE}x\n", "\n"])
def test_a_file_that_is_no_log_stays_as_it_is(log, content):
    log.write_text(content)
    log.chmod(0o644)
    with pytest.raises(OdmaError, match="no decision log"):
        RotatedFile(log, 100)
    assert (log.read_text(), stat.S_IMODE(log.stat().st_mode)) == (content, 0o644)


def test_a_log_that_others_could_read_is_closed_to_them(log):
    log.write_text(WHOLE)
    log.chmod(0o644)
    RotatedFile(log, 100).close()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_a_symbolic_link_is_not_followed(log, tmp_path):
    log.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OdmaError, match="cannot write the decision log"):
        RotatedFile(log, 100)


def test_what_does_not_fit_is_dropped_and_counted_and_nobody_waits(log, tmp_path, monkeypatch):
    monkeypatch.setattr(decisions, "PAUSE_SECONDS", 3600)
    monkeypatch.setattr(decisions, "MOST_QUEUED", 3)
    planes = Geometry((PlaneGroup(2, 64, 1),))
    spec = PoolSpec("main", "id", planes, 4096, model_length_tokens=4096, moves=Moves.NONE)
    policy = named("static", 4096, 4096)
    writer = DecisionLog(log, 1 << 20)
    with Pool.create(tmp_path / "main.pool", spec, 1, "boot", policy) as pool:
        for _ in range(5):
            writer.reconciled(pool, [1])
    assert writer.dropped == 2
    writer.close()


# --- as a trace ---


def test_a_decision_log_is_a_trace_for_the_replay(logging_server, log, name):
    lengths = [(100, 5), (200, 10), (300, 15)]
    with Client(logging_server.target) as service:
        pool = open_pool(service, name)
        for i, (prompt, output) in enumerate(lengths):
            place = pool.allocate(
                Allocate(f"r{i}", prompt, request_class=f"c{i % 2}", tenant=f"t{i}")
            )
            pool.free(Free(place.handle, End.FINISHED, output))
        pool.free(Free(pool.allocate(Allocate("aborted", 100)).handle, End.ABORTED, 5))
    records(log, 4)
    trace = read_trace(log)
    assert trace.tenant == ("t0", "t1", "t2")
    pairs = zip(trace.input_tokens.tolist(), trace.output_tokens.tolist(), strict=True)
    assert list(pairs) == lengths
    assert trace.request_class == ("c0", "c1", "c0")
    assert trace.t_seconds[0] == 0 < trace.t_seconds[2]
    assert trace.notes == ("dropped 1 row that did not end by themselves",)
    assert json.loads(run(*ODMA, "trace", "describe", "--json", log))["requests"] == 3


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"odma":"request","version":2}', "row 2: version 2, not 1"),
        ('{"odma":"weather"}', "row 2: not a record of a decision log"),
        ('{"odma":"request","version":1,"end":"FINISHED","asked":1,"prompt_tokens":"x"}', "column"),
        ("[]", "row 2: not a JSON object"),
    ],
)
def test_a_log_that_makes_no_sense_is_named_with_its_row(log, line, complaint):
    good = {"odma": "request", "version": 1, "end": "FINISHED"}
    good |= {"asked": 1, "prompt_tokens": 1, "output_tokens": 1}
    log.write_text(f"{json.dumps(good, separators=(',', ':'))}\n{line}\n")
    with pytest.raises(TraceError, match=complaint):
        read_trace(log)
