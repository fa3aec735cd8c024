"""Load: the requests of a trace under an engine's limits.

A request's maximum is min(input + max_output, model_length), the same for every policy. An
answer stops there, or where the trace says. Prompts are never cut: what cannot fit, in whole
pages of the largest size, is dropped for every policy, and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from odma_service.errors import InvalidError
from odma_service.traces import Trace
from odma_service.traces.trace import PREFIX_TOKENS
from odma_service.values import Text

LEAST_OUTPUT_TOKENS = 4_096
BLOCK_TOKENS = 16
LARGEST_PAGE_TOKENS = 256
BLOCK_ROWS = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """Where an engine stops a request. What it has must fit in whole pages of page_tokens."""

    max_output_tokens: int
    model_length_tokens: int
    capacity_tokens: int
    page_tokens: int = 1


class Request(NamedTuple):
    """One request. It stops at total_tokens, which is its maximum if `limited`."""

    prompt_tokens: int
    total_tokens: int
    maximum_tokens: int
    limited: bool
    request_class: str
    prefix_ids: tuple[int, ...] = ()
    text: Text | None = None
    tenant: str = ""

    @property
    def output_tokens(self) -> int:
        """Tokens that the engine will generate for it."""
        return self.total_tokens - self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in arrival order, and how many of the trace are not among them."""

    label: str
    limits: Limits
    requests: tuple[Request, ...]
    arrivals_seconds: tuple[float, ...]
    dropped: int
    block_tokens: int = PREFIX_TOKENS  # of prefix_ids

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.requests)


def limits_for(
    trace: Trace,
    capacity_tokens: int,
    max_output_tokens: int | None = None,
    model_length_tokens: int | None = None,
) -> Limits:
    """Return limits; where none is given, the least that cut nothing off in the trace.

    No limit on answers is taken to be below 4,096: a trace does not tell what its engine
    would have allowed. No request is longer than the capacity, which is whole blocks; pages of
    every policy are to hold it.
    """
    capacity_tokens -= capacity_tokens % BLOCK_TOKENS
    max_output = max_output_tokens or max(LEAST_OUTPUT_TOKENS, int(trace.output_tokens.max()))
    longest = model_length_tokens or int(trace.input_tokens.max()) + max_output
    return Limits(max_output, min(longest, capacity_tokens), capacity_tokens, LARGEST_PAGE_TOKENS)


def load_of(trace: Trace, limits: Limits, *, rate: float = 1.0) -> Load:
    """Return what is to be served; arrivals come `rate` times as fast as in the trace.

    Raises InvalidError if nothing fits.
    """
    prompts = trace.input_tokens
    maxima = np.minimum(prompts + limits.max_output_tokens, limits.model_length_tokens)
    wanted = prompts + trace.output_tokens
    totals = np.minimum(wanted, maxima)
    most = limits.capacity_tokens - limits.capacity_tokens % limits.page_tokens
    fits = (prompts < maxima) & (maxima <= limits.capacity_tokens) & (totals <= most)
    kept = np.flatnonzero(fits)
    if not kept.size:
        raise InvalidError(
            "capacity_tokens",
            "no request of the trace can ever fit: the shortest prompt has"
            f" {prompts.min():,} tokens, a request at most {limits.model_length_tokens:,}"
            f" and the pool, in whole pages, {most:,}",
        )
    limited = wanted >= prompts + limits.max_output_tokens
    limited |= wanted > maxima
    classes = trace.request_class or ("",) * len(trace)
    prefixes = trace.prefix_ids or ((),) * len(trace)
    texts = tuple(map(Text.of, trace.texts)) if trace.texts else (None,) * len(trace)
    tenants = trace.tenant or ("",) * len(trace)
    requests = tuple(
        Request(
            prompt,
            total,
            maximum,
            at_limit,
            classes[row],
            prefixes[row],
            texts[row],
            tenants[row],
        )
        for row, prompt, total, maximum, at_limit in zip(
            kept.tolist(),
            prompts[kept].tolist(),
            totals[kept].tolist(),
            maxima[kept].tolist(),
            limited[kept].tolist(),
            strict=True,
        )
    )
    arrivals = tuple((trace.t_seconds[kept] / rate).tolist())
    left_out = len(trace) - len(requests)
    return Load(trace.label, limits, requests, arrivals, left_out, trace.block_tokens)


def shuffled(trace: Trace, seed: int) -> Trace:
    """Return the trace with its rows in another order, in blocks of 64; seed 0 is as it is.

    A block keeps its order and its gaps between arrivals, so what changes fast in a trace
    stays and what changes slowly is mixed.
    """
    if seed == 0:
        return trace
    order = _block_order(len(trace), np.random.default_rng(seed))
    gaps = np.diff(trace.t_seconds, prepend=trace.t_seconds[0])
    return trace.part(order, np.cumsum(gaps[order]))


def _block_order(rows: int, random: np.random.Generator) -> NDArray[np.int64]:
    blocks = np.split(np.arange(rows), range(BLOCK_ROWS, rows, BLOCK_ROWS))
    return np.concatenate([blocks[i] for i in random.permutation(len(blocks))])
