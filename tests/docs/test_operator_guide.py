"""The operator's guide says what is true of the settings."""

from __future__ import annotations

import re

from paths import DOCS

from odma_service.service.config import Settings

GUIDE = DOCS / "guides" / "operator.md"
ROW = re.compile(r"^\| `([a-z-]+)` \| (.*?) \| (.*?) \|$", re.MULTILINE)


def test_the_table_of_settings_is_that_of_the_code():
    rows = {name: (default, text) for name, default, text in ROW.findall(GUIDE.read_text())}
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
