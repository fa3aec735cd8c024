"""The examples run, and find every token where the books say."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import JAVASCRIPT, ROOT
from running import BUILD_SECONDS, need_cpp, need_node, run
from servers import Server, wait_for

from odma_service.client import Client
from odma_service.errors import PoolNotFoundError

SANITIZED = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def test_the_c_engine_runs_under_the_sanitizers(tmp_path):
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "a C compiler builds the package, so there is one"
    sources = [ROOT / "examples" / "c" / "engine.c", ROOT / "csrc" / "odma.c"]
    engine = tmp_path / "engine"
    run(compiler, "-std=c11", *SANITIZED, "-I", ROOT / "csrc", *sources, "-lm", "-o", engine)
    told = run(engine, tmp_path / "books")
    assert "violations 0" in told
    assert "copies 0" not in told
    assert "reused 0" not in told


def test_the_python_engine_runs(server):
    told = run(sys.executable, ROOT / "examples" / "python" / "engine.py", server.target)
    assert "finished 100" in told
    assert "copies" in told
    assert "reused" in told
    assert "reused 0" not in told


def test_the_javascript_engine_runs(server):
    told = run(need_node(), JAVASCRIPT / "engine.js", server.target)
    assert "finished 100" in told
    assert "copies 0" not in told
    assert "reused 0" not in told


@pytest.mark.timeout(BUILD_SECONDS + 100)
def test_the_cpp_engine_runs(server):
    told = run(need_cpp() / "engine", server.target)
    assert "finished 100" in told
    assert "copies 0" not in told


def test_the_python_engine_outlives_a_killed_service(servers):
    engine = [sys.executable, ROOT / "examples" / "python" / "engine.py"]
    outlive(servers(), engine, "example-python")


def test_the_javascript_engine_outlives_a_killed_service(servers):
    outlive(servers(), [need_node(), JAVASCRIPT / "engine.js"], "example-javascript")


@pytest.mark.timeout(BUILD_SECONDS + 100)
def test_the_cpp_engine_outlives_a_killed_service(servers):
    outlive(servers(), [need_cpp() / "engine"], "example-cpp")


def outlive(server: Server, command: list[str | Path], pool: str) -> None:
    """Run an engine, kill the service under it and start that again; the engine must finish."""
    with (
        subprocess.Popen([*command, server.target], stdout=subprocess.PIPE, text=True) as engine,
        Client(server.target) as service,
    ):
        wait_for(lambda: last_seq(service, pool) > 100, "batch 100")
        server.restart()
        assert last_seq(service, pool) > 100
        told, _ = engine.communicate(timeout=100)
    assert engine.returncode == 0
    assert "finished 100" in told


def last_seq(service: Client, name: str) -> int:
    """Return the last answered seq, 0 before the pool is there."""
    try:
        return service.get_pool(name).last_seq
    except PoolNotFoundError:
        return 0
