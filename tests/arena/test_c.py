"""The C library seen from C, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from paths import CSRC

PROGRAM = Path(__file__).with_name("c") / "test_arena.c"
FACTS = re.findall(r"^    FACT\((\w+)\)", PROGRAM.read_text(), re.MULTILINE)
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wundef", "-Wpedantic", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """Return the test program, whose arenas call it before each store to their file."""
    return compiled(tmp_path_factory.mktemp("c") / "test_arena", SANITIZERS)


def compiled(built: Path, sanitizers: list[str]) -> Path:
    subprocess.run(
        [
            os.environ.get("CC", "gcc"),
            *("-std=c11", "-g", "-O1", *WARNINGS, *sanitizers),
            *("-DODMA_STORE_HOOK=before_store", f"-I{CSRC}"),
            *(PROGRAM, CSRC / "odma.c"),
            *("-o", built, "-lm", "-pthread"),
        ],
        check=True,
    )
    return built


@pytest.mark.parametrize("fact", FACTS)
def test_in_c(program, tmp_path, fact):
    run = subprocess.run([program, tmp_path, fact], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_every_fact_in_c_is_run(program):
    listed = subprocess.run([program], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == FACTS


def test_threads_do_not_race(tmp_path):
    program = compiled(tmp_path / "test_arena", ["-fsanitize=thread"])
    # Without random addresses: some kernels place them where the sanitizer cannot be.
    command = ["setarch", "--addr-no-randomize", program, tmp_path, "threads_take_turns"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr
