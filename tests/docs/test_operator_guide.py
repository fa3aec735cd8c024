"""The operator's guide says what is true of the settings."""

from __future__ import annotations

import re
from pathlib import Path

from odma_service.service.config import Settings

DOCS = Path(__file__).parents[2] / "docs"
ROW = re.compile(r"^\| `([a-z-]+)` \| (.*?) \| (.*?) \|$", re.MULTILINE)


def test_the_table_of_settings_is_that_of_the_code():
    rows = {name: (default, text) for name, default, text in ROW.findall(guide("operator-guide"))}
    fields = {name.replace("_", "-"): info for name, info in Settings.model_fields.items()}
    assert list(rows) == list(fields)
    for name, info in fields.items():
        default, text = rows[name]
        assert text == info.description
        assert default == shown(info.default) or info.default_factory, name


def shown(default: object) -> str:
    """Return a default as the table has it."""
    if default is None or default == "":
        return "none"
    if isinstance(default, tuple):
        return f"`{', '.join(default)}`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def test_every_page_that_is_linked_is_there():
    for page in ("operator-guide", "observability", "decision-log"):
        for link in re.findall(r"\]\(([a-z-]+\.md)\)", guide(page)):
            assert (DOCS / link).is_file(), (page, link)


def guide(page: str) -> str:
    return (DOCS / f"{page}.md").read_text()
