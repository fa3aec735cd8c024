"""The engine's tests run, or say loudly that they do not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from odma_service.__main__ import main
main()
"""


def test_what_the_engine_needs_is_installed(missing):
    if missing and not os.environ.get("ODMA_REQUIRE_TRANSFORMERS"):
        pytest.skip(
            f"ENGINE NOT TESTED: no {', '.join(missing)}; `make test-transformers` gets them"
        )
    assert missing == []


@pytest.mark.parametrize("command", [("generate", "model", "Hello"), ("serve-model", "model")])
def test_a_command_without_its_extra_says_which(command):
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *command], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert "torch is not installed: pip install 'odma-service[transformers]'" in ran.stderr
