"""A made-up load that is heavy-tailed and drifts, so that nothing learnt stays true.

Three classes of requests, each with log-normal prompts and answers. Over the trace all
answers grow longer and the mix of classes moves from chat towards reasoning: smoothly at
first, then, two thirds through, all at once. Arrivals are Poisson with a rate that rises
and falls once, like a day.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from odma_service.traces.trace import LARGEST_TOKENS, Trace, TraceError

LARGEST_ROWS = 10_000_000
LARGEST_INPUT_TOKENS = 8_192
REQUESTS_PER_SECOND = 1.0  # where the day is neither high nor low
DAY_SWING = 0.6
OUTPUT_GROWTH = 1.5  # the median answer at the end, over that at the start
SHIFT = 2 / 3  # of the trace


@dataclass(frozen=True, slots=True)
class _RequestClass:
    """Log-normal lengths, medians in tokens; shares at the start, before and after the shift."""

    name: str
    input_median: float
    input_sigma: float
    output_median: float
    output_sigma: float
    shares: tuple[float, float, float]


CLASSES = (
    _RequestClass("chat", 250, 0.9, 220, 0.9, (0.60, 0.40, 0.25)),
    _RequestClass("code", 1500, 0.8, 120, 0.8, (0.30, 0.30, 0.15)),
    _RequestClass("reasoning", 150, 0.7, 700, 1.0, (0.10, 0.30, 0.60)),
)


def generate(rows: int, seed: int, *, max_output_tokens: int = 4_096) -> Trace:
    """Return a synthetic trace of `rows` requests, the same for the same arguments.

    Answers are cut at `max_output_tokens`, as a serving engine would cut them. The drift
    spans the trace, whatever its length. Raises TraceError.
    """
    for name, value, least, most in (
        ("rows", rows, 1, LARGEST_ROWS),
        ("seed", seed, 0, 2**63 - 1),
        ("max_output_tokens", max_output_tokens, 1, LARGEST_TOKENS),
    ):
        if not least <= value <= most:
            raise TraceError(f"{name} must be from {least} to {most}, not {value}")
    random = np.random.default_rng(seed)
    progress = np.arange(rows) / rows

    rate = REQUESTS_PER_SECOND * (1 + DAY_SWING * np.sin(2 * np.pi * progress))
    t_seconds = np.cumsum(random.exponential(1 / rate))

    ends = np.cumsum([_shares(kind, progress) for kind in CLASSES], axis=0)
    choice = (random.random(rows) >= ends[:-1]).sum(axis=0)

    input_median, input_sigma, output_median, output_sigma = np.array(
        [(c.input_median, c.input_sigma, c.output_median, c.output_sigma) for c in CLASSES]
    )[choice].T
    inputs = random.lognormal(np.log(input_median), input_sigma)
    outputs = random.lognormal(np.log(output_median * OUTPUT_GROWTH**progress), output_sigma)
    return Trace(
        t_seconds,
        np.rint(inputs).clip(1, LARGEST_INPUT_TOKENS).astype(np.int64),
        np.rint(outputs).clip(1, max_output_tokens).astype(np.int64),
        f"synthetic seed={seed}",
        tuple(CLASSES[i].name for i in choice.tolist()),
    )


def _shares(kind: _RequestClass, progress: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a class's share of the requests: it slides until the shift, then jumps and stays."""
    start, before, after = kind.shares
    return np.where(progress < SHIFT, start + (before - start) * progress / SHIFT, after)
