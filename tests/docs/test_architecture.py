"""The map names files that are there."""

from __future__ import annotations

import re

from paths import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
ROOTS = (ROOT, ROOT / "odma_service", ROOT / "csrc" / "arena", ROOT / "odma_service" / "service")


def test_every_file_and_folder_on_the_map_is_there():
    named = set(re.findall(r"`([\w/]+(?:\.(?:py|c)|/))`", PAGE))
    assert len(named) > 30
    assert {name for name in named if not any((root / name).exists() for root in ROOTS)} == set()
