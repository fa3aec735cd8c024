"""The n-th call to the system fails, for each kind of call in turn: see refused.py."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import run

HERE = Path(__file__).parent
KINDS = [
    ("open", errno.EMFILE),
    ("open", errno.EACCES),
    ("open", errno.EROFS),
    ("fallocate", errno.ENOSPC),
    ("fallocate", errno.EIO),
    ("mmap", errno.ENOMEM),
    ("madvise", errno.ENOMEM),
    ("pread", errno.EIO),
    ("lseek", errno.EIO),
    ("fcntl", errno.ENOLCK),
    ("lstat", errno.EIO),
    ("fstat", errno.EIO),
    ("rename", errno.EROFS),
    ("unlink", errno.EACCES),
    ("malloc", errno.ENOMEM),
]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """Return the library that refuses."""
    library = tmp_path_factory.mktemp("refusals") / "refusals.so"
    run("cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "refusals.c", "-ldl")
    return library


@pytest.mark.parametrize(("kind", "number"), KINDS, ids=str)
def test_a_refusal_of_the_system_passes_and_nothing_sound_is_given_up(
    refusals, tmp_path, kind, number
):
    path = os.pathsep.join(part for part in sys.path if part)
    environment = {**os.environ, "LD_PRELOAD": str(refusals), "PYTHONPATH": path}
    command = [sys.executable, HERE / "refused.py", tmp_path, kind, str(number)]
    ran = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    assert int(ran.stdout.splitlines()[-1]) > 0  # it was refused at least once
