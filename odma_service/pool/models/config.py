"""Reading a config.json: nested configs, class defaults, types, and what nobody understood.

Transformers leaves out of a *nested* config what equals the default of its class, so a family
brings these defaults. A rule asks for the keys it understands; `check_understood` names the first
of the others that could change the cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from odma_service.errors import InvalidError
from odma_service.pool.geometry import MOST_MODEL_LENGTH_TOKENS, MOST_PLANE_BYTES, insist_count

MOST_CONFIG_BYTES = 4 * 2**20
MOST_DEPTH = 4
MOST_LAYERS = 2048

NESTED = (
    "text_config",
    "llm_config",
    "language_config",
    "language_model_config",
    "thinker_config",
    "decoder",
    "decoder_config",
)
"""Where models for more than text keep the config of their language model."""

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

CACHE_WORDS = re.compile(
    r"(?!moe_|mtp_|rope_|router_|vision_|audio_|image_|video_|mm_|tts_|n(um)?_shared_exp|shared_exp|.*multipliers?$)"
    r".*(kv|mla|sparse|cache|head|layer|window|share|loop|recur|compress|latent|lora|rank|index|cross|state"
    r"|ssm|mamba|conv|linear|pattern|interval|period|group|depth|repeat|memory|multi_query"
    r"|attn|attention|mixer|block|chunk|encoder|dim$|stack|width)"
)
"""A key with one of these words may change the cache of a family that does not read it.

Keys of experts, predictions, positions and other senses do not.
"""

GROWING_ROPES = {"dynamic", "longrope", "su"}
"""Scalings of RoPE by which a token's K depends on how long its request is or may get."""


@dataclass(frozen=True, slots=True)
class Family:
    """What is known of a model_type: its rule by name, where that comes from, its defaults."""

    rule: str
    source: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignores: tuple[str, ...] = ()
    mtp: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """The families by model_type, the language models of wrappers, and keys without effect."""

    families: Mapping[str, Family]
    wrapped: Mapping[str, str]
    inert: frozenset[str]


class Config:
    """The language model's part of a config.json; each value is checked when it is asked for."""

    def __init__(self, text: str, table: Table) -> None:
        self._chain = _chain(_parsed(text))
        *outer, (self.path, self._values) = self._chain
        self.nested = bool(outer)
        self._inert = table.inert
        self._asked = {"model_type", "hidden_size", "num_attention_heads", *NESTED}
        self.model_type = self._type_of(table)
        self.family = table.families.get(self.model_type)
        if _is_encoder_decoder(self._chain):
            raise InvalidError(
                "config_json.is_encoder_decoder",
                "an encoder-decoder keeps a KV of its encoder for each request;"
                " give the planes instead",
            )

    def _type_of(self, table: Table) -> str:
        """Return the model_type, or that which the config around this one implies."""
        own = self._values.get("model_type")
        if own is None and self.nested:
            around = self._chain[-2][1].get("model_type")
            own = table.wrapped.get(around) if isinstance(around, str) else None
        if own is not None and not isinstance(own, str):
            raise InvalidError(f"{self.path}.model_type", "must be a text")
        return own or ""

    # --- values ---

    def get(self, key: str) -> Any:
        """Return a value: the config's own, else the family's default, else None."""
        self._asked.add(key)
        alias = self.family.aliases.get(key) if self.family else None
        if alias is not None:
            self._asked.add(alias)
            if self._values.get(alias) is not None:
                return self._values[alias]
        if key in self._values:
            return self._values[key]  # null too: it stands for no value, not for the default
        return self.family.defaults.get(key) if self.family else None

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def field(self, key: str) -> str:
        """Return how an error names a key."""
        alias = self.family.aliases.get(key, key) if self.family else key
        return f"{self.path}.{key if key in self._values else alias}"

    def size(self, key: str, most: int = MOST_PLANE_BYTES) -> int:
        """Return a count that a file of its own always has: a default is for nested ones only."""
        alias = self.family.aliases.get(key, key) if self.family else key
        if not self.nested and self._values.get(key) is None and self._values.get(alias) is None:
            self._asked |= {key, alias}
            raise InvalidError(self.field(key), "is missing")
        return self.count(key, most)

    def count(self, key: str, most: int = MOST_PLANE_BYTES) -> int:
        value = self.get(key)
        if value is None:
            raise InvalidError(self.field(key), "is missing")
        insist_count(self.field(key), value, most)
        return int(value)

    def natural(self, key: str, most: int = MOST_LAYERS) -> int:
        """Return a count that may be 0, which no value stands for too."""
        return self.count(key, most) if self.get(key) not in (None, 0, False) else 0

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise InvalidError(self.field(key), "must be true or false")
        return bool(value)

    def items(self, key: str) -> list[Any]:
        value = self.get(key)
        if not isinstance(value, list) or len(value) > MOST_LAYERS:
            raise InvalidError(self.field(key), f"must be a list of at most {MOST_LAYERS:,}")
        return value

    def within(self, key: str) -> Config:
        """Return an object inside this config (attn_config of MPT) as a config of its own."""
        inner = self.get(key)
        if not isinstance(inner, dict):
            raise InvalidError(self.field(key), "must be a JSON object")
        part = object.__new__(Config)
        part.__dict__ = self.__dict__ | {
            "path": self.field(key),
            "nested": True,
            "family": None,
            "_values": inner,
            "_asked": set(),
        }
        return part

    def with_values(self, **values: Any) -> Config:
        """Return this config with other values; what is asked of either is asked of both."""
        changed = object.__new__(Config)
        changed.__dict__ = self.__dict__ | {"_values": self._values | values}
        return changed

    def refuse(self, key: str, rule: str) -> InvalidError:
        return InvalidError(self.field(key), f"{rule}; give the planes instead")

    # --- of the whole ---

    @property
    def layers(self) -> int:
        return self.size("num_hidden_layers", MOST_LAYERS)

    @property
    def model_length_tokens(self) -> int | None:
        key = "max_position_embeddings"
        return self.count(key, MOST_MODEL_LENGTH_TOKENS) if self.has(key) else None

    def growing_rope(self) -> str:
        """Return the name of what scales RoPE with the length of the request, "" if none does."""
        for key in ("rope_scaling", "rope_parameters"):
            said = self._values.get(key)
            for scaling in (said, *said.values()) if isinstance(said, dict) else ():
                if isinstance(scaling, dict) and GROWING_ROPES.intersection(
                    str(scaling.get(name)) for name in ("rope_type", "type")
                ):
                    return self.field(key)
        return self.field("use_dynamic_ntk") if self._values.get("use_dynamic_ntk") else ""

    def element_bytes(self) -> int:
        """Return the bytes of one element of the cache.

        A checkpoint with a quantised cache says so; otherwise the cache has the model's type.
        """
        return self._quantised_bytes() or self._type_bytes()

    def _type_bytes(self) -> int:
        for path, values in reversed(self._chain):
            for key in ("dtype", "torch_dtype"):
                if (name := values.get(key)) is None:
                    continue
                plain = name.removeprefix("torch.") if isinstance(name, str) else ""
                if plain not in ELEMENT_BYTES:
                    raise InvalidError(
                        f"{path}.{key}",
                        f"one of {', '.join(ELEMENT_BYTES)}; or give element_bytes",
                    )
                return ELEMENT_BYTES[plain]
        raise InvalidError(
            f"{self.path}.torch_dtype",
            f"is missing; it is one of {', '.join(ELEMENT_BYTES)}; or give element_bytes",
        )

    def _quantised_bytes(self) -> int:
        found = {
            _scheme_bytes(f"{path}.{key}", values[key])
            for path, values in self._chain
            for key in ("quantization_config", "compression_config")
            if isinstance(values.get(key), dict)
        } - {0}
        if len(found) > 1:
            raise InvalidError("config_json", "says two types of its cache; give element_bytes")
        return found.pop() if found else 0

    def check_understood(self) -> None:
        """Raise InvalidError for a key that nobody asked for and that may change the cache."""
        ignores = self.family.ignores if self.family else ()
        for key, value in self._values.items():
            if key in self._asked or key in self._inert or value in (None, False, 0, "", [], {}):
                continue
            if any(re.match(each, key) for each in ignores):
                continue
            if self.family is None:
                known = (
                    f"model_type {self.model_type!r} is not"
                    if self.model_type
                    else "no model_type is"
                )
                raise InvalidError(
                    f"{self.path}.{_printable(key)}",
                    f"is not understood, and {known} known here; give the planes instead",
                )
            if CACHE_WORDS.match(key):
                raise InvalidError(
                    f"{self.path}.{_printable(key)}",
                    f"is not understood for model_type {self.model_type!r};"
                    " give the planes instead",
                )


def _printable(key: str) -> str:
    return key[:64] if key.isprintable() else repr(key)[:64]


def _parsed(text: str) -> dict[str, Any]:
    if len(text.encode(errors="replace")) > MOST_CONFIG_BYTES:
        raise InvalidError("config_json", f"at most {MOST_CONFIG_BYTES:,} bytes")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidError("config_json", f"must be JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidError("config_json", "must be a JSON object")
    return config


def _chain(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the config and those inside it, down to the language model's, with their names."""
    chain = [("config_json", config)]
    while inner := [key for key in NESTED if chain[-1][1].get(key) is not None]:
        path, values = chain[-1]
        for key in inner:
            if not isinstance(values[key], dict):
                raise InvalidError(f"{path}.{key}", "must be a JSON object")
        distinct = [key for key in inner if values[key] != values[inner[0]]]
        if distinct or len(chain) > MOST_DEPTH:
            raise InvalidError(f"{path}.{inner[-1]}", f"one language model only, beside {inner[0]}")
        chain.append((f"{path}.{inner[0]}", values[inner[0]]))
    return chain


def _is_encoder_decoder(chain: list[tuple[str, dict[str, Any]]]) -> bool:
    return any(
        values.get("is_encoder_decoder")
        or values.get("add_cross_attention")
        or ("decoder" in values and "encoder" in values)
        for _, values in chain
    )


def _scheme_bytes(path: str, scheme: dict[str, Any]) -> int:
    """Return the bytes that a quantised checkpoint has for an element of the cache; 0: not said."""
    found = 0
    for key, value in _about_the_cache(scheme):
        if value in (None, False, "", [], {}, "auto", "none", "None"):
            continue
        named = isinstance(value, str) and value.lower().startswith("fp8")
        if not named and not (isinstance(value, dict) and _is_of_8_bits(value)):
            raise InvalidError(f"{path}.{_printable(key)}", "is not understood; give element_bytes")
        found = 1
    return found


def _about_the_cache(scheme: dict[str, Any]) -> list[tuple[str, Any]]:
    inner = [each for each in scheme.values() if isinstance(each, dict)]
    return [
        (key, value)
        for values in (scheme, *inner)
        for key, value in values.items()
        if key.startswith("kv_cache")
    ]


def _is_of_8_bits(scheme: dict[str, Any]) -> bool:
    per_tensor = scheme.get("strategy") in (None, "tensor", "channel", "attn_head")
    return scheme.get("num_bits") == 8 and per_tensor
