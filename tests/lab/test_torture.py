"""What a kill leaves behind is what was acknowledged: a few kills here, `make torture` for many,
and `make soak` for long.
"""

from __future__ import annotations

import json
import sys

import pytest
from running import odma

from lab.robustness.killed_arena import Subject
from lab.robustness.twin import Findings, Held, Outcome, Twin
from odma_service.values import Allocate, Batch, End, Extend, Free, Freed, Place

KINDS = ("lost", "doubled", "leaked", "wrong_replays")


@pytest.mark.timeout(300)
def test_nothing_is_forgotten_when_processes_are_killed():
    run = odma("bench", "torture", "--kills", 60, "--json", timeout=280)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert told["kills"] == told["service"]["kills"] + told["arena"]["kills"] == 60
    assert [told[kind] for kind in KINDS] == [0, 0, 0, 0]
    assert told["in_batch"] > 0
    assert told["service"]["at_stores"]["in_batch"] > 0
    assert told["service"]["acknowledged"].keys() >= {"Apply", "Allocate", "Free", "Reconcile"}
    assert told["acknowledged"] > 60
    assert told["service"]["reused_tokens"] > 0
    assert told["arena"]["reused_tokens"] > 0
    assert told["arena"]["found_tokens"] > 0


def test_nothing_is_forgotten_while_engines_and_the_server_fail():
    run = odma("bench", "soak", "--minutes", 0.1, "--faults", "--json")
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert [told[kind] for kind in KINDS] == [0, 0, 0, 0]
    assert told["batches"] > 100
    assert {"INTERNAL", "UNKNOWN"}.isdisjoint(told["errors"])
    assert {fault.split()[0] for fault in told["faults"]} & {"crash", "hang", "break", "garbage"}
    assert any(fault.startswith("server") for fault in told["faults"])
    assert told["messages"]["delivered_late"] > 0


# --- that it would be noticed ---

GIVES_UP = """#!{python}
import os, signal, sys
from pathlib import Path
from odma_service._native import Arena
sys.stdin.read()
with Arena.attach(Path(sys.argv[1])) as arena:
    live = [entry.handle for entry in arena.regions(0, 10_000) if entry.live]
    arena.reconcile(arena.report().epoch, live)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_kept_is_lost_if_regions_alone_survive(tmp_path):
    program = tmp_path / "gives-up"
    program.write_text(GIVES_UP.format(python=sys.executable))
    program.chmod(0o700)
    findings = Findings()
    subject = Subject(program, tmp_path / "p.pool", "one stream, reuse", 1, findings)
    subject.torture(1, lambda: None)
    assert (findings.lost, findings.doubled, findings.leaked) == (2, 0, 0)
    assert "tokens to reuse" in findings.words[0]
    assert "keys stand otherwise" in findings.words[1]


HELD = Held("a", 1, 0, 64)
OTHER = Held("b", 2, 64, 64)


def found(model: list[Held], live: list[Held], held_tokens: int | None = None) -> dict[str, int]:
    findings = Findings()
    if held_tokens is None:
        held_tokens = sum(region.length_tokens for region in live)
    findings.compare("here", Twin({region.handle: region for region in model}), live, held_tokens)
    assert len(findings.words) == sum(getattr(findings, kind) for kind in KINDS)
    return {kind: getattr(findings, kind) for kind in KINDS if getattr(findings, kind)}


def test_books_like_the_model_are_found_right():
    assert found([HELD, OTHER], [OTHER, HELD]) == {}


def test_a_region_that_is_gone_is_lost():
    assert found([HELD, OTHER], [HELD]) == {"lost": 1}


def test_a_region_in_another_place_is_lost():
    assert found([HELD], [HELD._replace(start_token=16)]) == {"lost": 1}


def test_a_region_that_was_freed_is_leaked():
    assert found([HELD], [HELD, OTHER]) == {"leaked": 1}


def test_blocks_that_no_region_has_are_leaked():
    assert found([HELD], [HELD], held_tokens=0) == {"leaked": 1}


def test_two_regions_in_one_place_are_doubled():
    clash = OTHER._replace(start_token=48)
    assert found([HELD, clash], [HELD, clash]) == {"doubled": 1}


def test_a_request_with_two_regions_is_doubled():
    twin = OTHER._replace(request_id="a")
    assert found([HELD, twin], [HELD, twin]) == {"doubled": 1}


def test_a_model_follows_the_answers():
    first = Batch(1, 0, [], [Allocate("a", 10), Allocate("b", 10)])
    model = Twin().after(first.ops, Outcome((Place(1, 0, 64), Place(2, 64, 64)), (), ()))
    assert model.held == {1: HELD, 2: OTHER}
    second = Batch(2, 0, [], [Free(1, End.FINISHED), Extend(2, 100)])
    model = model.after(second.ops, Outcome((Freed(), Place(2, 0, 128)), (), ()))
    assert model.held == {2: Held("b", 2, 0, 128)}
    third = Batch(3, 0, [], [Allocate("c", 10)])
    model = model.after(third.ops, Outcome((Place(3, 0, 64),), (), (Place(2, 64, 128),)))
    assert model.held == {2: Held("b", 2, 64, 128), 3: Held("c", 3, 0, 64)}
