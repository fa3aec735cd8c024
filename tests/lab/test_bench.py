"""The benchmarks run and say what they measured; how fast is for `make bench`."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from running import odma

from lab.bench import building
from lab.bench.arena import SOURCE
from lab.bench.building import BenchError
from odma_service.__main__ import main
from odma_service.cli import lazy


@pytest.fixture(scope="module")
def figures():
    run = odma("bench", "arena", "--steps", "2000", "--repeats", "1", "--json")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize(("size", "live"), [("small", 300), ("big", 18_700)])
def test_each_size_is_measured_beside_malloc(figures, size, live):
    told = figures[size]
    assert abs(told["live"] - live) < live / 5
    for group in ("alone", "batches_of_64"):
        assert told[group]["arena_ns"] > 0
        assert told[group]["malloc_ns"] > 0
        assert told[group]["ratio"] > 0
    assert 0 <= told["full_95"]["refused_share"] < 0.1
    assert told["full_95"]["refused_share_compacting"] == 0
    assert told["planning"]["without_p50_us"] > 0
    assert told["planning_99"]["without_p50_us"] > 0


def test_attaching_is_measured(figures):
    assert figures["attach"]["regions"] == 20_000
    assert figures["attach"]["ms"] > 0


def test_goals_are_told_beside_the_figures(figures):
    assert figures["goals"]["ratio_small_batches"] == 2.2


def test_a_figure_table_is_for_people():
    run = odma("bench", "arena", "--steps", "1000", "--repeats", "1")
    assert run.returncode == 0, run.stderr
    assert "ratio to malloc" in run.stdout


def test_a_decode_step_is_measured_beside_an_echo():
    run = odma("bench", "rpc", "--steps", "10", "--repeats", "1", "--json")
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    measured = [one for group in ("apply", "predicted", "traced") for one in told[group].values()]
    assert len(measured) == 7
    assert isinstance(told["tls"], dict) == bool(shutil.which("openssl"))
    measured += told["tls"].values() if shutil.which("openssl") else []
    assert set(told["keyed"]) == {"known", "new"}
    measured += told["keyed"].values()
    for ways in [*measured, {"unary": told["allocate"]}]:
        for way in ways.values():
            assert min(way.values()) > 0
    assert set(told["styles"]) == {"threads", "asyncio", "executor"}
    assert told["goals"] == {"p50_ratio_16": 1.3, "p50_ratio_64": 2.0, "p50_ratio_keyed": 1.5}


def test_without_a_source_tree_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lazy, "SOURCE_TREE", tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lab"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", ["odma", "bench", "arena", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "odma bench arena" in capsys.readouterr().err


def test_without_a_compiler_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(BenchError, match="no C compiler"):
        building.compile_program(SOURCE, tmp_path)
