"""The text of an answer that still grows: what can be shown already, and where it stops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Prose:
    """Turns the tokens of one answer into text, a token at a time.

    Characters whose bytes are not all there are held back, and so is what may become one of
    `stops`: a text at which the answer stops, and which does not belong to it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = stops
        self._tokens: list[int] = []
        self._context = self._shown = 0  # tokens: before what is decoded, and shown of it
        self._held = ""

    def add(self, token: int) -> str:
        """Return what can be shown after one more token."""
        self._tokens.append(token)
        return self._release(self._decoded(), to_end=False)

    def end(self) -> str:
        """Return what was held back."""
        return self._release(self._decoded(all_of_it=True), to_end=True)

    def _decoded(self, *, all_of_it: bool = False) -> str:
        """Return the text of the new tokens; what a token looks like depends on those before."""
        before = self._text(self._tokens[self._context : self._shown])
        text = self._text(self._tokens[self._context :])
        if text.endswith(UNFINISHED) and not all_of_it:
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return text[len(before) :]

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _release(self, text: str, *, to_end: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        if found:
            ready = min(found)
        elif to_end:
            ready = len(self._held)
        else:
            ready = len(self._held) - max(map(self._begun, self._stops), default=0)
        shown, self._held = self._held[:ready], self._held[ready:]
        return shown

    def _begun(self, stop: str) -> int:
        """Return how much of `stop` the held text ends with."""
        most = min(len(stop) - 1, len(self._held))
        return next((n for n in range(most, 0, -1) if self._held.endswith(stop[:n])), 0)
