"""The engine's tests run, or say loudly that they do not."""

from __future__ import annotations

import os

import pytest


def test_what_the_engine_needs_is_installed(missing):
    if missing and not os.environ.get("ODMA_REQUIRE_TRANSFORMERS"):
        pytest.skip(
            f"ENGINE NOT TESTED: no {', '.join(missing)}; `make test-transformers` gets them"
        )
    assert missing == []
