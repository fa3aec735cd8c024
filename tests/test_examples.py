"""The examples run, and find every token where the books say."""

from __future__ import annotations

import shutil
import sys

from test_conformance import JAVASCRIPT, ROOT, need_node, run

SANITIZED = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def test_the_c_engine_runs_under_the_sanitizers(tmp_path):
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "a C compiler builds the package, so there is one"
    sources = [ROOT / "examples" / "c" / "engine.c", *sorted((ROOT / "csrc").glob("*.c"))]
    engine = tmp_path / "engine"
    run(compiler, "-std=c11", *SANITIZED, "-I", ROOT / "csrc", *sources, "-lm", "-o", engine)
    told = run(engine, tmp_path / "books")
    assert "violations 0" in told
    assert "copies 0" not in told


def test_the_python_engine_runs(server):
    told = run(sys.executable, ROOT / "examples" / "python" / "engine.py", server.target)
    assert "finished 100" in told
    assert "copies" in told


def test_the_javascript_engine_runs(server):
    told = run(need_node(), JAVASCRIPT / "engine.js", server.target)
    assert "finished 100" in told
    assert "copies 0" not in told
