"""What a client gets, in the words of OpenAI's interface."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]
DONE = "data: [DONE]\n\n"


@dataclass
class Usage:
    """Tokens of all prompts and of all answers, those that ended them included."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def body(self) -> Body:
        """Return the usage as a client gets it."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass
class Answer:
    """The answer to one call, `chat` or not; `created` in seconds since 1970."""

    chat: bool
    name: str
    model: str
    created: int
    usage: Usage = field(default_factory=Usage)

    def whole(self, texts: list[str], reasons: list[str]) -> Body:
        """Return all choices in one body."""
        choices = [
            self._choice(i, reason, {"message": {"role": "assistant", "content": text}}, text)
            for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        kind = "chat.completion" if self.chat else "text_completion"
        return self._body(kind, choices) | {"usage": self.usage.body()}

    def begin(self, index: int) -> str:
        """Return the event that opens a choice of a chat, and none for a completion."""
        if not self.chat:
            return ""
        opening = {"delta": {"role": "assistant", "content": ""}}
        return self._event([self._choice(index, None, opening, "")])

    def more(self, index: int, text: str, reason: str | None) -> str:
        """Return the event with the next text of a choice, and why it ended if it did."""
        delta = {"delta": {"content": text} if text else {}}
        return self._event([self._choice(index, reason, delta, text)])

    def end(self, *, with_usage: bool) -> str:
        """Return the events behind the last text."""
        told = self._event([], usage=self.usage.body()) if with_usage else ""
        return told + DONE

    def _choice(self, index: int, reason: str | None, in_chat: Body, text: str) -> Body:
        said = in_chat if self.chat else {"text": text}
        return {"index": index, **said, "logprobs": None, "finish_reason": reason}

    def _event(self, choices: list[Body], **more: Any) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event(self._body(kind, choices) | more)

    def _body(self, kind: str, choices: list[Body]) -> Body:
        return {
            "id": self.name,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def event(body: Body) -> str:
    """Return an event of a stream."""
    return f"data: {json.dumps(body)}\n\n"
