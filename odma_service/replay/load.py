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
    block_ids: tuple[int, ...] = ()  # of whole blocks of prompt and answer, as far as known
    text: Text | None = None
    tenant: str = ""

    @property
    def output_tokens(self) -> int:
        """Tokens that the engine will generate for it."""
        return self.total_tokens - self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in arrival order, and how many of the trace are not among them.

    A request whose `after` is not -1 comes its gap after that request's answer; the others, and
    all where it is empty, when they arrive.
    """

    label: str
    limits: Limits
    requests: tuple[Request, ...]
    arrivals_seconds: tuple[float, ...]
    dropped: int
    block_tokens: int = PREFIX_TOKENS  # of block_ids
    after: tuple[int, ...] = ()
    gaps_seconds: tuple[float, ...] = ()

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
    """Return what is to be served; arrivals and waits are `rate` times as fast as in the trace.

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
    left_out = len(trace) - len(kept)
    trace = trace.part(kept)
    classes = trace.request_class or ("",) * len(trace)
    texts = tuple(map(Text.of, trace.texts)) if trace.texts else (None,) * len(trace)
    tenants = trace.tenant or ("",) * len(trace)
    requests = tuple(
        map(
            Request,
            trace.input_tokens.tolist(),
            totals[kept].tolist(),
            maxima[kept].tolist(),
            limited[kept].tolist(),
            classes,
            _block_ids(trace, totals[kept].tolist()),
            texts,
            tenants,
        )
    )
    arrivals = tuple((trace.t_seconds / rate).tolist())
    waits = trace.waits
    return Load(
        trace.label,
        limits,
        requests,
        arrivals,
        left_out,
        trace.block_tokens,
        () if waits is None else tuple(waits.after_row.tolist()),
        () if waits is None else tuple((waits.gap_seconds / rate).tolist()),
    )


def _block_ids(trace: Trace, totals: list[int]) -> list[tuple[int, ...]]:
    """Return the ids of whole blocks of each prompt and its answer, as far as they are known.

    Who waits for an answer and begins as that prompt, and is long enough, has the answer next.
    """
    prefixes, prompts = trace.prefix_ids, trace.input_tokens.tolist()
    if prefixes is None:
        return [()] * len(trace)
    size = trace.block_tokens
    known = [ids[: tokens // size] for ids, tokens in zip(prefixes, prompts, strict=True)]
    for row, after in enumerate(() if trace.waits is None else trace.waits.after_row.tolist()):
        asked = prefixes[after][: prompts[after] // size]
        begins_so = prefixes[row][: len(asked)] == asked
        if after >= 0 and begins_so and prompts[row] >= totals[after]:
            known[after] = prefixes[row][: totals[after] // size]
    return known


def shuffled(trace: Trace, seed: int) -> Trace:
    """Return the trace with its rows in another order, in blocks of 64; seed 0 is as it is.

    Raises InvalidError for another seed where requests wait for answers: they have one order.

    A block keeps its order and its gaps between arrivals, so what changes fast in a trace
    stays and what changes slowly is mixed.
    """
    if seed == 0:
        return trace
    if trace.waits is not None:
        raise InvalidError("seeds", f"1: {trace.label} has requests that wait for answers")
    order = _block_order(len(trace), np.random.default_rng(seed))
    gaps = np.diff(trace.t_seconds, prepend=trace.t_seconds[0])
    return trace.part(order, np.cumsum(gaps[order]))


def _block_order(rows: int, random: np.random.Generator) -> NDArray[np.int64]:
    blocks = np.split(np.arange(rows), range(BLOCK_ROWS, rows, BLOCK_ROWS))
    return np.concatenate([blocks[i] for i in random.permutation(len(blocks))])
