"""Text that strangers chose, made safe to show."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return a text that does nothing to a terminal but show itself; lines stay lines.

    >>> printable("a\\x1b[2Jb")
    'a [2Jb'
    """
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)
