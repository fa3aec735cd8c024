"""Every relative link of the pages leads to a file, and every anchor to a heading."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path
from urllib.parse import unquote

import pytest
from paths import ROOT

PATTERNS = ("*.md", "docs/**/*.md", "examples/*.md", "examples/*/*.md", "tests/**/README.md")
PAGES = sorted(set(chain.from_iterable(map(ROOT.glob, PATTERNS))))
LINK = re.compile(r"\]\(([^()\s]+)\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


def test_the_pages_are_found():
    names = {page.relative_to(ROOT).as_posix() for page in PAGES}
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/README.md"} <= names
    assert {"docs/guides/engine.md", "examples/README.md", "tests/conformance/README.md"} <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_resolves(page):
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# The page: *first*, `second()`\n## Twice\n## Twice\n```\n# no heading [no](link)\n```\n"
        "[a](#the-page-first-second) [b](#twice-1) [c](page.md#twice) [d](https://example.org/x)\n"
        "`[e](code.md)` [f](gone.md) [g](#no-heading) [h](page.md#twice-2)\n"
    )
    assert broken(page) == ["gone.md", "#no-heading", "page.md#twice-2"]


def broken(page: Path) -> list[str]:
    """Return the relative links of a page that lead nowhere."""
    links = LINK.findall(CODE.sub("", page.read_text()))
    return [link for link in links if "://" not in link and not resolves(page, link)]


def resolves(page: Path, link: str) -> bool:
    path, _, anchor = unquote(link).partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in anchors(target.read_text()))


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in HEADING.findall(re.sub(r"(?ms)^```.*?^```$", "", text)):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        repeated = (f"{name}-{i}" for i in range(1, len(text)))
        found.add(next(each for each in chain([name], repeated) if each not in found))
    return found
