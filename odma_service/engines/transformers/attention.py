"""The attention of a decoder over planes: a start and a length for each request, no block table.

A step is one packed row with the new tokens of many requests, pieces of prompts and single
tokens mixed. In each layer their keys and values are written at the places of their regions, and
each piece attends over a view of its region: nothing is gathered and nothing is padded.

Transformers calls `attend` because it is registered under the name `odma`, and masks come as a
Rule: the model's own function of positions, evaluated for each request. A few models do not pass
keywords on to the attention, so the running step is a context variable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from odma_service.errors import OdmaError

NAME = "odma"

Layers = Mapping[int, tuple[Tensor, Tensor]]
"""The planes of keys and of values by layer: [token][head][dim]."""


class Piece(NamedTuple):
    """New tokens of one request: rows [first, last) of the packed row, the end of its `total`."""

    first: int
    last: int
    start_token: int
    total: int

    @property
    def new(self) -> int:
        """Tokens of this piece."""
        return self.last - self.first


class Rule:
    """Which tokens a token sees, in the place of a mask, where it is not all before it."""

    shape = (1, 1, 1, 1)  # a few models look at it

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.sees = function


class Call(NamedTuple):
    """One call of the attention, in the shapes of Transformers: (1, heads, tokens, dim)."""

    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    rule: Rule | None
    scale: float | None
    told: dict[str, Any]
    """Further keywords of the model; None where it says nothing."""


class Attends(Protocol):
    """What runs while a model does: a Step, or the probe of its shapes."""

    def attend(self, call: Call) -> Tensor:
        """Return (1, tokens, heads, dim)."""


_running: ContextVar[Attends | None] = ContextVar("odma_step", default=None)


@contextmanager
def running(step: Attends) -> Iterator[None]:
    """Let calls of the attention go to `step` while the context lasts."""
    token = _running.set(step)
    try:
        yield
    finally:
        _running.reset(token)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Rule | None,
    scaling: float | None = None,
    **told: Any,
) -> tuple[Tensor, None]:
    """Be the attention of Transformers. Raises OdmaError outside of an engine's step."""
    step = _running.get()
    if step is None:
        raise OdmaError(
            "the model attends over an engine's planes: call set_attn_implementation('sdpa')"
            " before it is used without the engine"
        )
    return step.attend(Call(module, query, key, value, attention_mask, scaling, told)), None


def mask(*_: Any, mask_function: Any = causal_mask_function, **__: Any) -> Rule | None:
    """Be the maker of masks of Transformers."""
    return None if mask_function is causal_mask_function else Rule(mask_function)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)


class Step:
    """One forward over the planes: what it writes, and where each piece reads."""

    def __init__(self, layers: Layers, pieces: Sequence[Piece], device: torch.device) -> None:
        self._layers = layers
        self._pieces = pieces
        slots = [
            slot
            for piece in pieces
            for slot in range(
                piece.start_token + piece.total - piece.new, piece.start_token + piece.total
            )
        ]
        self._slots = torch.tensor(slots, device=device)
        self._masks: dict[tuple[int, int, int, Rule | None], Tensor] = {}

    def attend(self, call: Call) -> Tensor:
        """Write the new keys and values of a layer, and let each piece attend over its region."""
        keys, values = self._layers[call.module.layer_idx]
        keys.index_copy_(0, self._slots, call.key[0].transpose(0, 1))
        values.index_copy_(0, self._slots, call.value[0].transpose(0, 1))
        window = call.told.get("sliding_window") or 0
        softcap, sinks = call.told.get("softcap"), call.told.get("s_aux")
        _, heads, rows, _ = call.query.shape
        out = call.query.new_empty(rows, heads, call.value.shape[3])
        for piece in self._pieces:
            low = max(0, piece.total - piece.new + 1 - window) if window else 0
            seen = slice(piece.start_token + low, piece.start_token + piece.total)
            query = call.query[0, :, piece.first : piece.last]
            key, value = keys[seen].transpose(0, 1), values[seen].transpose(0, 1)
            allowed = self._allowed(piece, low, window, call.rule)
            if softcap or sinks is not None:
                found = _explicit(query, key, value, allowed, call.scale, softcap, sinks)
            else:
                found = _fused(query, key, value, allowed, call.scale)
            out[piece.first : piece.last] = found.transpose(0, 1)
        return out[None]

    def _allowed(self, piece: Piece, low: int, window: int, rule: Rule | None) -> Tensor | None:
        """Return which tokens from `low` on each new token sees; None: all of them."""
        if rule is None and piece.new == 1:
            return None  # what is outside of the window is below `low`
        name = (piece.first, low, window, rule)
        if name not in self._masks:  # else a layer before this one asked
            device = self._slots.device
            at = torch.arange(piece.total - piece.new, piece.total, device=device)[:, None]
            seen = torch.arange(low, piece.total, device=device)[None]
            allowed = seen <= at if rule is None else rule.sees(0, 0, at, seen)
            self._masks[name] = allowed & (seen > at - window) if window else allowed
        return self._masks[name]


def _fused(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, scale: float | None
) -> Tensor:
    heads, new, dim = query.shape
    if new > 1:
        found = scaled_dot_product_attention(
            query[None], key[None], value[None], allowed, scale=scale, enable_gqa=True
        )
        return found.reshape(heads, new, -1)
    # One token: the heads of a group are the queries of one head of the cache.
    grouped = query.reshape(1, key.shape[0], -1, dim)
    found = scaled_dot_product_attention(grouped, key[None], value[None], allowed, scale=scale)
    return found.reshape(heads, 1, -1)


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend with capped scores or with sinks, which no fused kernel of torch knows."""
    heads, new, dim = query.shape
    grouped = query.reshape(key.shape[0], -1, dim)
    scores = (grouped @ key.transpose(1, 2)).view(heads, new, -1)
    scores = scores * (dim**-0.5 if scale is None else scale)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(-1, new, 1)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[1]]
    return (weights.reshape(key.shape[0], -1, key.shape[1]) @ value).view(heads, new, -1)
