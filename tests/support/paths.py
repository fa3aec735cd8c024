"""Where what the tests read is found."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
DOCS = ROOT / "docs"
JAVASCRIPT = ROOT / "examples" / "javascript"
