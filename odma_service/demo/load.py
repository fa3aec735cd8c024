"""What the engine is asked to do: the requests of a trace under the engine's limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from odma_service.traces import Trace


@dataclass(frozen=True, slots=True)
class Limits:
    """Where an engine stops a request."""

    max_output_tokens: int
    model_length_tokens: int
    capacity_tokens: int

    def maximum(self, prompt_tokens: int) -> int | None:
        """Return the longest total of a request, or None if it can never fit.

        >>> Limits(4096, 16384, 111_000).maximum(100)
        4196
        """
        total = min(prompt_tokens + self.max_output_tokens, self.model_length_tokens)
        fits = prompt_tokens < self.model_length_tokens and total <= self.capacity_tokens
        return total if fits else None


class Request(NamedTuple):
    """One request. It stops at total_tokens, which is its maximum if `limited`."""

    number: int
    prompt_tokens: int
    total_tokens: int
    maximum_tokens: int
    limited: bool
    request_class: str

    @property
    def output_tokens(self) -> int:
        """Tokens that the engine will generate for it."""
        return self.total_tokens - self.prompt_tokens


def requests_of(trace: Trace, limits: Limits) -> list[Request]:
    """Return the requests that can ever fit, in arrival order. Prompts are never cut."""
    lengths = zip(trace.input_tokens.tolist(), trace.output_tokens.tolist(), strict=True)
    classes = trace.request_class or ("",) * len(trace)
    requests = []
    for number, (prompt, output) in enumerate(lengths):
        maximum = limits.maximum(prompt)
        if maximum is not None:
            total = min(prompt + output, maximum)
            limited = prompt + output > maximum
            requests.append(Request(number, prompt, total, maximum, limited, classes[number]))
    return requests
