"""Kinds of layers, and what each keeps for every token.

A family's rule turns a config into one Layer for each layer of the model. Where several keys say
which layers attend, they have to agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from odma_service.errors import InvalidError
from odma_service.pool.models.config import MOST_LAYERS, Config


class Kind(StrEnum):
    """What a layer keeps for a request."""

    FULL = "full"  # every token
    SLIDING = "sliding"  # the tokens of a window
    STATE = "state"  # a state of fixed size
    CROSS = "cross"  # the tokens of an image or a sound
    SHARED = "shared"  # nothing: it reads another layer's
    NONE = "none"  # nothing: it does not attend


TOKENS = {Kind.FULL, Kind.SLIDING}


class Plane(NamedTuple):
    """One tensor of a layer's cache: so many heads, each `width` elements wide.

    heads 0: there are no heads to divide, so it is whole on every rank. fixed_bytes: those of a
    token, whatever the type of the cache.
    """

    name: str
    width: int
    heads: int = 0
    fixed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Layer:
    kind: Kind
    planes: tuple[Plane, ...] = ()
    has_state: bool = False  # beside its planes


WORDS = {
    "full_attention": Kind.FULL,
    "attention": Kind.FULL,
    "global_attention": Kind.FULL,
    "hybrid": Kind.FULL,
    "indexed_attention": Kind.FULL,
    "sliding_attention": Kind.SLIDING,
    "chunked_attention": Kind.SLIDING,
    "local_attention": Kind.SLIDING,
    "linear_attention": Kind.STATE,
    "mamba": Kind.STATE,
    "mamba2": Kind.STATE,
    "recurrent": Kind.STATE,
    "conv": Kind.STATE,
    "mlp": Kind.NONE,
    "moe": Kind.NONE,
}
PATTERN = {"*": Kind.FULL, "M": Kind.STATE, "-": Kind.NONE, "E": Kind.NONE}


def _words(config: Config, key: str) -> list[Kind]:
    words = config.items(key)
    for word in words:
        if not isinstance(word, str) or word not in WORDS:
            known = ", ".join(sorted(WORDS))
            raise config.refuse(key, f"only {known}, not {str(word)[:40]!r}")
    return [WORDS[word] for word in words]


def _pattern(config: Config, key: str) -> list[Kind]:
    text = config.get(key)
    if not isinstance(text, str) or not set(text) <= set(PATTERN) or len(text) > MOST_LAYERS:
        raise config.refuse(key, f"must be a text of {' '.join(PATTERN)}")
    return [PATTERN[letter] for letter in text]


def _numbers(zero: Kind, one: Kind) -> Callable[[Config, str], list[Kind]]:
    def read(config: Config, key: str) -> list[Kind]:
        numbers = config.items(key)
        if any(number not in (0, 1) for number in numbers):
            raise config.refuse(key, "must be a list of 0 and 1")
        return [one if number else zero for number in numbers]

    return read


def _interval(config: Config, key: str) -> list[Kind]:
    every = config.count(key, MOST_LAYERS)
    return [Kind.STATE if (i + 1) % every else Kind.FULL for i in range(config.layers)]


def _groups(config: Config, key: str) -> list[Kind]:
    if config.layers % config.count(key, MOST_LAYERS):
        raise config.refuse(key, f"must divide {config.layers} layers")
    return _interval(config, key)


def _period(config: Config, key: str) -> list[Kind]:
    every, offset = config.count(key, MOST_LAYERS), config.natural("attn_layer_offset")
    return [Kind.FULL if i % every == offset else Kind.STATE for i in range(config.layers)]


def _listed(listed: Kind, other: Kind) -> Callable[[Config, str], list[Kind]]:
    def read(config: Config, key: str) -> list[Kind]:
        numbers, layers = config.items(key), config.layers
        for number in numbers:
            whole = isinstance(number, int) and not isinstance(number, bool)
            if not whole or not 0 <= number < layers:
                raise config.refuse(key, f"must list some of {layers} layers")
        return [listed if i in numbers else other for i in range(layers)]

    return read


def _cycle(config: Config, key: str) -> list[Kind]:
    words = _words(config, key)
    return [words[i % len(words)] for i in range(config.layers)] if words else []


READERS: dict[str, Callable[[Config, str], list[Kind]]] = {
    "layer_types": _words,
    "layers_block_type": _words,
    "hybrid_override_pattern": _pattern,
    "hybrid_layer_pattern": _numbers(Kind.FULL, Kind.SLIDING),
    "attn_type_list": _numbers(Kind.STATE, Kind.FULL),
    "full_attention_interval": _interval,
    "layer_group_size": _groups,
    "attn_layer_period": _period,
    "attn_layer_indices": _listed(Kind.FULL, Kind.STATE),
    "full_attn_idxs": _listed(Kind.FULL, Kind.STATE),
    "cross_attention_layers": _listed(Kind.CROSS, Kind.FULL),
    "block_types": _cycle,
}


def kinds(config: Config, *keys: str) -> list[Kind] | None:
    """Return the kind of each layer as these keys say it; None if none of them is there.

    Raises InvalidError if two disagree, or one is not about each layer.
    """
    said = {key: READERS[key](config, key) for key in keys if config.has(key)}
    if not said:
        return None
    first, *others = said
    if len(said[first]) != config.layers:
        raise config.refuse(first, f"must be about {config.layers} layers, not {len(said[first])}")
    for key in others:
        if said[key] != said[first]:
            raise config.refuse(key, f"says other layers than {first}")
    return said[first]


def attending(config: Config) -> list[Kind]:
    """Return the kinds where each layer keeps every token, or a window of them."""
    keys = ("layer_types", "attn_type_list")
    found = kinds(config, *keys) or [Kind.FULL] * config.layers
    for kind in found:
        if kind not in TOKENS:
            key = next(key for key in keys if config.has(key))
            raise config.refuse(key, f"a layer of kind {kind} is not understood here")
    return found


def hybrid(config: Config, *keys: str) -> list[Kind]:
    """Return the kinds where some layers keep a state; one of the keys must say which."""
    found = kinds(config, *keys)
    if found is None:
        raise InvalidError(config.field(keys[0]), f"is missing: one of {', '.join(keys)}")
    return found


def kv(heads: int, k: int, v: int | None = None) -> tuple[Plane, ...]:
    """Return the planes of ordinary attention, grouped or not."""
    return Plane("K", k, heads), Plane("V", k if v is None else v, heads)


def latent(width: int) -> tuple[Plane, ...]:
    """Return the one plane of latent attention: what all heads share."""
    return (Plane("latent", width),)


def layers_of(found: list[Kind], planes: tuple[Plane, ...]) -> list[Layer]:
    """Return layers of which those that keep tokens have the same planes."""
    return [Layer(kind, planes if kind in TOKENS else ()) for kind in found]


def sharing(layers: list[Layer], last: int) -> list[Layer]:
    """Return the layers, of which the `last` read what an earlier one of their kind keeps."""
    own = layers[: len(layers) - last]
    return [*own, *[Layer(Kind.SHARED)] * (len(layers) - len(own))]


def counted(layers: list[Layer]) -> Iterator[tuple[Kind, int]]:
    """Yield how many layers there are of each kind."""
    for kind in Kind:
        if number := sum(layer.kind is kind for layer in layers):
            yield kind, number
