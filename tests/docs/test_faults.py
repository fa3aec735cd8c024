"""The page of faults names proofs that there are."""

from __future__ import annotations

import re

from paths import DOCS, ROOT

PAGE = (DOCS / "reference" / "faults.md").read_text()


def test_every_proof_is_there():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 40
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_every_make_target_is_there():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)", PAGE)) <= set(targets)


def test_every_row_says_how_it_was_found_and_what_shows_that_it_is_gone():
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    assert len(rows) > 40
    assert all(len(row) == 3 for row in rows)
