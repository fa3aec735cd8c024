"""The fuzz targets over their corpus, built by a plain compiler. `make fuzz` looks for more."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from paths import CSRC

FUZZ = Path(__file__).with_name("fuzz")
TARGETS = ("batches", "features", "files")


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_that_was_found_comes_back(tmp_path, target):
    program = tmp_path / target
    subprocess.run(
        [
            os.environ.get("CC", "gcc"),
            *("-std=c11", "-g", "-O1", "-fsanitize=address,undefined"),
            *("-fno-sanitize-recover=all", f"-I{CSRC}", f"-I{FUZZ}"),
            *(FUZZ / f"{target}.c", FUZZ / "driver.c", CSRC / "odma.c"),
            *("-o", program, "-lm", "-pthread"),
        ],
        check=True,
    )
    corpus = sorted((FUZZ / "corpus" / target).glob("*.hex"))
    assert corpus
    run = subprocess.run([program, *corpus], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == len(corpus)
