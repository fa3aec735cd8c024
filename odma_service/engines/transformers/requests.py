"""A request of an engine: what was asked, and how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from odma_service.errors import InvalidError, OdmaError
from odma_service.values import End, Place

MOST_TEMPERATURE = 2.0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. temperature 0: the likeliest one, always."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= MOST_TEMPERATURE:
            raise InvalidError("temperature", f"0 to {MOST_TEMPERATURE:g}")
        if not 0 < self.top_p <= 1:
            raise InvalidError("top_p", "above 0, at most 1")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InvalidError("seed", "a number of 64 bits")

    def generator(self) -> torch.Generator:
        """Return the source of random numbers of one request."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


@dataclass(eq=False)
class Request:
    """One request. `text` is its prompt for the service, which predicts lengths from it."""

    prompt: Sequence[int]
    most_tokens: int
    """Most tokens of the answer."""
    stop_tokens: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    text: str | None = None

    output: list[int] = field(default_factory=list)
    """The answer so far, with the stop token that ended it."""
    end: End | None = None
    """How the request ended. Its memory is given back in the batch after that."""
    error: OdmaError | None = None
    """Why the request was given up: it never fits."""

    number: int = 0
    """In the order of arrival; the engine's, like all below."""
    place: Place | None = None
    computed: int = 0
    """Tokens whose keys and values are written."""
    preempted: bool = False
    """It makes way for others in the next batch, and comes back."""
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InvalidError("prompt", "at least 1 token")
        if self.most_tokens < 1:
            raise InvalidError("most_tokens", f"at least 1, not {self.most_tokens}")
        self.generator = self.sampling.generator()

    @property
    def over(self) -> bool:
        """Whether nothing more is computed for it."""
        return self.end is not None or self.error is not None

    @property
    def leaves(self) -> bool:
        """Whether its region is given back in the next batch."""
        return self.over or self.preempted

    @property
    def total(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.prompt) + len(self.output)

    def tokens(self, first: int, last: int) -> list[int]:
        """Return the tokens [first, last) of prompt and answer."""
        prompt = len(self.prompt)
        return [
            *self.prompt[first:last],
            *self.output[max(first - prompt, 0) : max(last - prompt, 0)],
        ]
