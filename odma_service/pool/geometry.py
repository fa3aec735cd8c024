"""Geometry: what a token of a pool's memory is made of, and what moving it costs.

A plane is a run of memory indexed by token: the K or the V of one layer, say. A region is
the same token range in every plane, so all that a copy costs follows from how many planes
there are and how many bytes a token takes in each.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, replace
from hashlib import blake2b
from typing import NamedTuple

from odma_service.errors import InvalidError
from odma_service.values import PlaneGroup

MOST_GROUPS = 64
MOST_PLANES = 4096
MOST_PLANE_BYTES = 2**24
MOST_ALIGNMENT_BYTES = 2**20
MOST_CONFIG_BYTES = 64 * 1024
MOST_MODEL_LENGTH_TOKENS = 2**24
MOST_RANKS = 4096

ELEMENT_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
}
"""Bytes of one element, by the name a model config has for its type."""

PER_TOKEN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers that keep a K and a V for every token."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The planes of one rank's memory.

    >>> Geometry((PlaneGroup(56, 1024),)).bytes_per_token
    57344
    """

    planes: tuple[PlaneGroup, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.planes) <= MOST_GROUPS:
            raise InvalidError("planes", f"1 to {MOST_GROUPS} groups, not {len(self.planes)}")
        for i, group in enumerate(self.planes):
            _insist_count(f"planes[{i}].count", group.count, MOST_PLANES)
            _insist_count(f"planes[{i}].bytes_per_token", group.bytes_per_token, MOST_PLANE_BYTES)
            alignment = group.alignment_bytes
            _insist_count(f"planes[{i}].alignment_bytes", alignment, MOST_ALIGNMENT_BYTES)
            if alignment & (alignment - 1):
                raise InvalidError(
                    f"planes[{i}].alignment_bytes", f"must be a power of two, not {alignment}"
                )
        if self.plane_count > MOST_PLANES:
            raise InvalidError(
                "planes", f"at most {MOST_PLANES:,} planes in all, not {self.plane_count:,}"
            )

    @property
    def plane_count(self) -> int:
        """Planes in all groups."""
        return sum(group.count for group in self.planes)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all planes."""
        return sum(group.count * group.bytes_per_token for group in self.planes)

    def tokens_in(self, capacity_bytes: int) -> int:
        """Return how many whole tokens fit into so many bytes over all planes."""
        return capacity_bytes // self.bytes_per_token

    def check_alignment(self, block_tokens: int) -> None:
        """Raise InvalidError unless every block starts aligned in every plane."""
        for i, group in enumerate(self.planes):
            if block_tokens * group.bytes_per_token % group.alignment_bytes:
                raise InvalidError(
                    f"planes[{i}].alignment_bytes",
                    f"must divide a block of {block_tokens} x {group.bytes_per_token} bytes",
                )

    def digest(self, block_tokens: int) -> int:
        """Return 64 bits that stand for the planes and the block size."""
        planes = [astuple(group) for group in self.planes]
        text = json.dumps([block_tokens, planes], separators=(",", ":"))
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Device:
    """What copies are priced from.

    `descriptor_seconds` is what one copy descriptor costs on top of its bytes. It is not
    published for the presets: 100 ns is an assumption, to be replaced by a measurement.
    `copy_efficiency` is what copies of long runs reach of the bandwidth: for the presets, what
    the LPDDR emulation gives (tests/test_lpddr.py holds it to that).
    """

    preset: str = "mlu370-x4"
    memory_bytes: int = 24 * 2**30
    bandwidth_bytes_per_second: float = 307.2e9
    descriptor_seconds: float = 100e-9
    copy_efficiency: float = 0.89

    def __post_init__(self) -> None:
        if not 1e6 <= self.bandwidth_bytes_per_second <= 1e15:
            raise InvalidError("bandwidth_bytes_per_second", "1e6 to 1e15")
        if not 0 <= self.descriptor_seconds <= 1:
            raise InvalidError("descriptor_seconds", "0 to 1")
        if not 0 < self.copy_efficiency <= 1:
            raise InvalidError("copy_efficiency", "above 0, at most 1")

    def token_seconds(self, bytes_per_token: int) -> float:
        """Return what copying one token costs: every byte is read and written."""
        return 2 * bytes_per_token / (self.bandwidth_bytes_per_second * self.copy_efficiency)


PRESETS = {
    "mlu370-x4": Device(),
    "mlu370-x8": Device("mlu370-x8", 48 * 2**30, 614.4e9, copy_efficiency=0.87),
}


def device(
    preset: str = "",
    bandwidth_bytes_per_second: float | None = None,
    descriptor_seconds: float | None = None,
) -> Device:
    """Return a preset ("": mlu370-x4) with the given figures in place of its own."""
    chosen = PRESETS.get(preset or "mlu370-x4")
    if chosen is None:
        raise InvalidError("preset", f"one of {', '.join(PRESETS)}, not {preset!r}")
    if bandwidth_bytes_per_second is not None:
        chosen = replace(chosen, bandwidth_bytes_per_second=bandwidth_bytes_per_second)
    if descriptor_seconds is not None:
        chosen = replace(chosen, descriptor_seconds=descriptor_seconds)
    return chosen


class ModelGeometry(NamedTuple):
    """What a model config says. model_length_tokens None: it does not."""

    geometry: Geometry
    model_length_tokens: int | None


def from_model_config(
    config_json: str, tensor_parallel: int = 0, element_bytes: int = 0
) -> ModelGeometry:
    """Return the geometry of one rank from the text of a Hugging Face config.json.

    KV heads are divided over `tensor_parallel` ranks (0: one), or replicated where there
    are fewer heads than ranks. The compressed cache of DeepSeek's latent attention has no
    heads and is whole on every rank. An element takes `element_bytes` (0: as torch_dtype
    says). Raises InvalidError naming the key or the argument.
    """
    ranks = tensor_parallel or 1
    _insist_count("tensor_parallel", ranks, MOST_RANKS)
    if element_bytes:
        _insist_count("element_bytes", element_bytes, 16)
    config = _Config(config_json)
    config.check_layers()
    element = element_bytes or config.element_bytes()
    layers = config.count("num_hidden_layers", MOST_PLANES // 2)
    if config.has("kv_lora_rank"):
        latent = config.count("kv_lora_rank") + config.count("qk_rope_head_dim")
        planes = PlaneGroup(layers, latent * element)
    else:
        heads = _heads_per_rank(config.kv_heads(), ranks)
        planes = PlaneGroup(2 * layers, heads * config.head_dim() * element)
    return ModelGeometry(Geometry((planes,)), config.model_length_tokens())


def _heads_per_rank(heads: int, ranks: int) -> int:
    if heads % ranks and ranks % heads:
        raise InvalidError(
            "tensor_parallel", f"must divide {heads} KV heads, or be a multiple of them"
        )
    return max(1, heads // ranks)


class _Config:
    """A config.json whose every value is checked when it is asked for."""

    def __init__(self, text: str) -> None:
        if len(text.encode(errors="replace")) > MOST_CONFIG_BYTES:
            raise InvalidError("config_json", f"at most {MOST_CONFIG_BYTES:,} bytes")
        try:
            config = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidError("config_json", f"must be JSON: {error}") from None
        if not isinstance(config, dict):
            raise InvalidError("config_json", "must be a JSON object")
        nested = config.get("text_config")
        if nested is not None and not isinstance(nested, dict):
            raise InvalidError("config_json.text_config", "must be a JSON object")
        # A model for more than text keeps what its language model has in text_config.
        inner = {key: value for key, value in (nested or {}).items() if value is not None}
        self._values = config | inner

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def count(self, key: str, most: int = MOST_PLANE_BYTES) -> int:
        if not self.has(key):
            raise InvalidError(f"config_json.{key}", "is missing")
        value: int = self._values[key]
        _insist_count(f"config_json.{key}", value, most)
        return value

    def kv_heads(self) -> int:
        has_own = self.has("num_key_value_heads")
        return self.count("num_key_value_heads" if has_own else "num_attention_heads")

    def head_dim(self) -> int:
        if self.has("head_dim"):
            return self.count("head_dim")
        hidden, heads = self.count("hidden_size"), self.count("num_attention_heads")
        if hidden % heads:
            raise InvalidError(
                "config_json.hidden_size", f"must be a multiple of {heads} attention heads"
            )
        return hidden // heads

    def element_bytes(self) -> int:
        key = "torch_dtype" if self.has("torch_dtype") else "dtype"
        name = self._values.get(key)
        if not isinstance(name, str) or name not in ELEMENT_BYTES:
            raise InvalidError(
                "config_json.torch_dtype",
                f"one of {', '.join(ELEMENT_BYTES)}; or give element_bytes",
            )
        return ELEMENT_BYTES[name]

    def model_length_tokens(self) -> int | None:
        key = "max_position_embeddings"
        return self.count(key, MOST_MODEL_LENGTH_TOKENS) if self.has(key) else None

    def check_layers(self) -> None:
        kinds = self._values.get("layer_types") or []
        if not isinstance(kinds, list) or not all(
            isinstance(kind, str) and kind in PER_TOKEN_LAYERS for kind in kinds
        ):
            raise InvalidError(
                "config_json.layer_types",
                f"only {', '.join(sorted(PER_TOKEN_LAYERS))}; give the planes instead",
            )


def _insist_count(field: str, value: object, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise InvalidError(field, f"must be a whole number from 1 to {most:,}")
