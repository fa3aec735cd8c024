"""The memory of an engine: a plane of keys and one of values for each layer, and its copies.

The shapes are found by running the model on one token, not read from its config: that is right
for every kind of attention, and it shows which layers do not attend through the interface. Layers
that attend over another layer's keys (Gemma 3n and 4) share its planes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from odma_service.engines.transformers.attention import NAME, Call, Layers, running
from odma_service.engines.transformers.fitness import (
    FAILURES,
    check_config,
    check_keywords,
    check_layers,
    check_pieces,
    longest_total,
    unfit,
)
from odma_service.errors import InvalidError
from odma_service.values import Copy, PlaneGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK_TOKENS = 16
STAGE_TOKENS = 256
"""Tokens that an overlapping copy takes at once through a buffer of its own."""


class Shape(NamedTuple):
    """What planes of one group have in common."""

    heads: int
    dim: int
    dtype: torch.dtype


class Planes:
    """Keys and values of `capacity_tokens` tokens, on the model's device.

    Makes the model attend over them: before it is used without the engine its attention has to
    be set back, by its set_attn_implementation(). Raises UnfitModelError for a model that
    cannot be served so.
    """

    def __init__(self, model: PreTrainedModel, capacity_tokens: int) -> None:
        check_config(model)
        if capacity_tokens < BLOCK_TOKENS:
            raise InvalidError("capacity_tokens", f"at least {BLOCK_TOKENS}, not {capacity_tokens}")
        self.capacity_tokens = capacity_tokens // BLOCK_TOKENS * BLOCK_TOKENS
        self.longest_tokens = min(longest_total(model), self.capacity_tokens)
        """The longest total that a request may have."""
        model.set_attn_implementation(NAME)
        probe = _Probe(model)
        check_layers(model, probe.calls)
        self._groups: dict[Shape, Tensor] = {}
        self.layers = self._lay_out(probe, model.device)
        check_pieces(model, self.layers)

    def _lay_out(self, probe: _Probe, device: torch.device) -> Layers:
        """Make the planes of each shape as one tensor, so that a copy is one operation in it."""
        own = {source: probe.shapes[source] for source in probe.sources.values()}
        wanted = [shape for shapes in own.values() for shape in shapes]
        for shape in dict.fromkeys(wanted):
            size = (wanted.count(shape), self.capacity_tokens, shape.heads, shape.dim)
            self._groups[shape] = torch.zeros(size, dtype=shape.dtype, device=device)
        free = {shape: iter(group) for shape, group in self._groups.items()}
        made = {layer: (next(free[key]), next(free[value])) for layer, (key, value) in own.items()}
        return {layer: made[source] for layer, source in probe.sources.items()}

    def geometry(self) -> list[PlaneGroup]:
        """Return the planes as OpenPool takes them."""
        return [
            PlaneGroup(len(group), group[0, 0].numel() * group.element_size())
            for group in self._groups.values()
        ]

    def run(self, copies: Iterable[Copy]) -> None:
        """Do the copies of an answer in their order, in every plane, each as memmove would.

        Torch does not: where source and destination overlap, a piece is copied at once only as
        far as it reaches, or through a buffer, from the end that is written last.
        """
        for copy in copies:
            distance = abs(copy.to_token - copy.from_token)
            size = max(distance, STAGE_TOKENS)
            firsts = range(0, copy.tokens, size)
            for first in reversed(firsts) if copy.to_token > copy.from_token else firsts:
                tokens = min(size, copy.tokens - first)
                for group in self._groups.values():
                    source = group.narrow(1, copy.from_token + first, tokens)
                    group.narrow(1, copy.to_token + first, tokens).copy_(
                        source if tokens <= distance else source.clone()
                    )


class _Probe:
    """One token through the model, to see what each layer would keep."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.calls: list[int] = []
        self.shapes: dict[int, tuple[Shape, Shape]] = {}
        self.sources: dict[int, int] = {}
        """Whose keys and values a layer attends over: most have their own."""
        self._model = model
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # alive, so that no address comes twice
        one = torch.ones(1, 1, dtype=torch.long, device=model.device)
        try:
            with torch.inference_mode(), running(self):
                model(input_ids=one, position_ids=one - 1, attention_mask=one, use_cache=False)
        except FAILURES as error:
            raise unfit(model, f"its forward fails without a cache: {error}") from error
        self._kept.clear()

    def attend(self, call: Call) -> Tensor:
        """Note the shapes of a layer, and return zeros."""
        check_keywords(self._model, call)
        layer = call.module.layer_idx
        self.calls.append(layer)
        self.shapes[layer] = (_shape_of(call.key), _shape_of(call.value))
        self.sources[layer] = next(
            (
                other
                for other, (key, value) in self._kept.items()
                if _same(key, call.key) and _same(value, call.value)
            ),
            layer,
        )
        self._kept[layer] = (call.key, call.value)
        _, heads, rows, _ = call.query.shape
        return call.value.new_zeros(1, rows, heads, call.value.shape[3])


def _shape_of(tensor: Tensor) -> Shape:
    return Shape(tensor.shape[1], tensor.shape[3], tensor.dtype)


def _same(one: Any, other: Any) -> bool:
    return bool(one.data_ptr() == other.data_ptr() and one.shape == other.shape)
