"""Which models can be served over planes, and by what name the others are refused.

What a model computes for a token has to follow from the keys and values of the tokens before it:
nothing else is kept from step to step. Most of this is tried, not read from a list of kinds: the
model computes a few tokens at once by its own attention, and again in two pieces beside another
request over the planes. A state outside of the planes, a neighbour that is seen, or a part of the
attention that this package does not know make another result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from odma_service.engines.transformers.attention import (
    NAME,
    Call,
    Layers,
    Piece,
    Rule,
    Step,
    running,
)
from odma_service.errors import UnfitModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a model's own code raises for an input that it cannot take."""

ROPE_BY_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary positions that change for all tokens once one lies beyond the trained length."""

KNOWN = {"sliding_window", "softcap", "s_aux", "is_causal"}
HARMLESS = {
    "dropout",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "use_cache",
}

TRIED_TOKENS, FIRST_PIECE, NEIGHBOUR_TOKENS = 8, 5, 6
MOST_DIFFERENCE = {torch.float32: 1e-3, torch.float64: 1e-3}
MOST_ROUNDING = 0.15
"""Mean differences of logits as shares of their deviation. Another model differs by about 1."""


def unfit(model: PreTrainedModel, rule: str) -> UnfitModelError:
    """Return the error for a model that breaks a rule."""
    return UnfitModelError(model.config.model_type, rule)


def check_config(model: PreTrainedModel) -> None:
    """Raise UnfitModelError for what no run of a few tokens shows."""
    if model.config.is_encoder_decoder:
        raise unfit(model, "it has an encoder: only decoders are served")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise unfit(model, "it lies on several devices: load it on one")


def longest_total(model: PreTrainedModel) -> int:
    """Return the tokens up to which a request does not depend on its neighbours' lengths."""
    config: Any = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or 2**20
    ropes = getattr(config, "rope_parameters", None) or {}
    # One record, or one for each kind of layer.
    for rope in (ropes, *(each for each in ropes.values() if isinstance(each, dict))):
        if rope.get("rope_type") in ROPE_BY_LENGTH:
            trained = rope.get("original_max_position_embeddings")
            longest = min(longest, trained or config.max_position_embeddings)
    return int(longest)


def check_keywords(model: PreTrainedModel, call: Call) -> None:
    """Raise UnfitModelError for a part of the attention that this package does not know."""
    if not isinstance(call.rule, Rule | None):
        raise unfit(model, "its attention makes a mask of its own")
    told = {name for name, value in call.told.items() if value is not None}
    for name in sorted(told - KNOWN - HARMLESS):
        raise unfit(model, f"its attention needs {name!r}, which is not known here")
    if call.told.get("is_causal") is False or getattr(call.module, "is_causal", True) is False:
        raise unfit(model, "its tokens see later ones")


def check_layers(model: PreTrainedModel, calls: Sequence[int]) -> None:
    """Raise UnfitModelError unless each layer has attended once, through the interface."""
    layers = model.config.get_text_config().num_hidden_layers
    if not calls:
        raise unfit(model, "it does not use the attention interface of Transformers")
    if any(count > 1 for count in Counter(calls).values()):
        raise unfit(model, "a layer attends more than once")
    if len(calls) != layers:
        raise unfit(
            model,
            f"{len(calls)} of its {layers} layers use the attention interface: the others keep"
            " a state that is not made of tokens",
        )


def check_pieces(model: PreTrainedModel, layers: Layers) -> None:
    """Raise UnfitModelError unless pieces beside another request give what the whole gives."""
    tokens = torch.arange(1, TRIED_TOKENS + NEIGHBOUR_TOKENS + 1, device=model.device)
    tokens %= model.config.get_text_config().vocab_size
    tried, neighbour = tokens[:TRIED_TOKENS], tokens[TRIED_TOKENS:]
    try:
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            alone = model(input_ids=tried[None], use_cache=False).logits[0, -1].double()
        model.set_attn_implementation(NAME)
        first = Piece(0, FIRST_PIECE, NEIGHBOUR_TOKENS, FIRST_PIECE)
        beside = Piece(FIRST_PIECE, FIRST_PIECE + NEIGHBOUR_TOKENS, 0, NEIGHBOUR_TOKENS)
        forward(
            model, layers, torch.cat([tried[:FIRST_PIECE], neighbour]).tolist(), [first, beside]
        )
        rest = Piece(0, TRIED_TOKENS - FIRST_PIECE, NEIGHBOUR_TOKENS, TRIED_TOKENS)
        pieces = forward(model, layers, tried[FIRST_PIECE:].tolist(), [rest])[-1].double()
    except FAILURES as error:
        raise unfit(model, f"its forward fails: {error}") from error
    different = float((pieces - alone).abs().mean() / alone.std())
    if not different <= MOST_DIFFERENCE.get(model.dtype, MOST_ROUNDING):
        raise unfit(
            model,
            "pieces of a prompt give another result than the whole (mean difference of logits"
            f" {different:.2g} of their deviation): it keeps more than keys and values, or its"
            " attention has a part that is not known here",
        )


def forward(
    model: PreTrainedModel, layers: Layers, tokens: Sequence[int], pieces: Sequence[Piece]
) -> Tensor:
    """Compute the new tokens of all pieces; return the logits behind the last of each piece."""
    device = model.device
    positions = [at for piece in pieces for at in range(piece.total - piece.new, piece.total)]
    lasts = torch.tensor([piece.last - 1 for piece in pieces], device=device)
    with torch.inference_mode(), running(Step(layers, pieces, device)):
        logits: Tensor = model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long, device=device),
            use_cache=False,
            logits_to_keep=lasts,
        ).logits[0]
    return logits
