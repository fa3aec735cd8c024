"""Predictor: how long an answer will be, from its prompt and from the answers before it.

What is known is worth more than any text: the last completions of the same model and class
(History) set the level and the spread, the prompt moves and narrows them. Without text the
counts and the history remain; without history the answer is wide.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from odma_service.errors import InvalidError
from odma_service.values import QUANTILE_LEVELS, Quantiles

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

WINDOW = 100
"""Completions that a History is of, at most."""


def default_model() -> Path:
    """Return the directory of the model that comes with the package."""
    return Path(str(files("predictor_onnx"))) / "model"


@dataclass(frozen=True, slots=True)
class History:
    """The last completions of one model and class, as log(1 + output tokens).

    `quantiles` are at QUANTILE_LEVELS, interpolated between neighbours. `count`, at most
    WINDOW, says of how many; 0: nothing is known and the other fields mean nothing.
    """

    mean: float = 0.0
    sd: float = 0.0
    quantiles: Quantiles = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    count: int = 0

    @property
    def q95(self) -> float:
        """The length, as its logarithm, that one completion in twenty passes."""
        return self.quantiles[5]

    @classmethod
    def of(cls, output_tokens: Iterable[float]) -> History:
        """Return the history of these completions, oldest first: of the last WINDOW of them.

        Made anew it costs tens of microseconds: keep it until something completes.

        >>> History.of([6, 6, 6]).quantiles[2] == math.log(7)
        True
        """
        logs = sorted(math.log1p(tokens) for tokens in list(output_tokens)[-WINDOW:])
        if not logs:
            return cls()
        mean = math.fsum(logs) / len(logs)
        sd = math.sqrt(math.fsum((value - mean) ** 2 for value in logs) / len(logs))
        a, b, c, d, e, f, g = (_between(logs, level) for level in QUANTILE_LEVELS)
        return cls(mean, sd, (a, b, c, d, e, f, g), len(logs))


class PromptInput(NamedTuple):
    """What is known of a request: its prompt (UTF-8, None: not told), its length, its history."""

    text: bytes | None
    prompt_tokens: int
    history: History


class Predictor:
    """A model directory, loaded and checked. Any thread may ask it."""

    def __init__(self, version: str, wide: Quantiles) -> None:
        """Use Predictor.load."""
        self.version = version
        self._wide = wide

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Load a model. Raises InvalidError that names what is wrong with it."""
        try:
            config = json.loads((directory / "config.json").read_bytes())
            version = str(config["version"])
            a, b, c, d, e, f, g = map(float, config["wide"])
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise InvalidError("model", f"{directory}: config.json: {problem!r}") from None
        return cls(version, (a, b, c, d, e, f, g))

    def predict(self, prompts: Sequence[PromptInput]) -> list[Quantiles]:
        """Return quantiles of output tokens at QUANTILE_LEVELS for each prompt, ascending."""
        return [
            _tokens(prompt.history.quantiles) if prompt.history.count else self._wide
            for prompt in prompts
        ]


def _between(ascending: Sequence[float], level: float) -> float:
    place = level * (len(ascending) - 1)
    below = int(place)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (place - below) * (ascending[above] - ascending[below])


def _tokens(logs: Quantiles) -> Quantiles:
    a, b, c, d, e, f, g = (math.expm1(value) for value in logs)
    return a, b, c, d, e, f, g
