"""The page of models names each family beside its rule."""

from __future__ import annotations

import tomllib

from paths import ROOT

PAGE = (ROOT / "docs/reference/models.md").read_text()
MODELS = tomllib.loads((ROOT / "odma_service/data/models.toml").read_text())


def test_every_family_stands_beside_its_rule():
    rows = [row.split(" | ") for row in PAGE.splitlines() if row.startswith("| `")]
    page = {name: row[0].strip("| `") for row in rows for name in row[2].strip("| ").split(", ")}
    assert page == {name: family["rule"] for name, family in MODELS["families"].items()}


def test_every_refused_family_is_named():
    for reason, names in MODELS["refused"].items():
        assert f"- The cache of {', '.join(names)} {reason}." in PAGE
