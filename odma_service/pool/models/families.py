"""Rules: what each layer of a family keeps for every token.

data/models.toml says which family has which rule, and its source. A rule reads all the keys that
its family's cache depends on; keys that it does not read refuse the config.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from odma_service.errors import InvalidError
from odma_service.pool.models.config import MOST_LAYERS, Config, Family, Table
from odma_service.pool.models.layers import (
    Kind,
    Layer,
    Plane,
    attending,
    hybrid,
    kinds,
    kv,
    latent,
    layers_of,
    sharing,
)

MODELS = Path(__file__).parents[2] / "data" / "models.toml"
INDEXER_BLOCK = 128
"""Elements of an indexer's key that share one scale of 4 bytes."""

BLOCK_KEYS = {
    "n_heads_in_group",
    "no_op",
    "num_key_value_heads",
    "num_sink_tokens",
    "replace_with_linear",
    "sparsify",
    "unshifted_sink",
    "use_prefill_window_in_sink_attention",
    "window_length",
}
"""What is understood of the attention of a block."""


def layers_from(config: Config) -> list[Layer]:
    """Return the layers of a model. Raises InvalidError naming what is not understood."""
    if config.model_type in _refused():
        raise InvalidError(
            f"{config.path}.model_type",
            f"the cache of {config.model_type} {_refused()[config.model_type]};"
            " give the planes instead",
        )
    layers = RULES[config.family.rule](config) if config.family else _plain(config)
    config.check_understood()
    return layers


def mtp_layers(config: Config, layers: list[Layer]) -> list[Layer]:
    """Return the layers of multi-token prediction: each like the model's last full one."""
    key = config.family.mtp if config.family else ""
    if not key:
        raise InvalidError("mtp", f"not known for model_type {config.model_type!r}")
    full = [layer for layer in layers if layer.kind is Kind.FULL]
    return full[-1:] * config.count(key, MOST_LAYERS)


# --- heads ---


def _kv_heads(config: Config) -> int:
    if not config.has("num_key_value_heads"):
        return config.size("num_attention_heads")
    kv_heads = config.count("num_key_value_heads")
    if config.has("num_attention_heads"):
        heads = config.count("num_attention_heads")
        if heads % kv_heads:
            raise InvalidError(
                config.field("num_key_value_heads"), f"must divide {heads} attention heads"
            )
    return kv_heads


def _head_dim(config: Config, *keys: str) -> int:
    """Return the width of a head as the keys say it, of which all that are there must agree."""
    said = {key: config.count(key) for key in keys or ("head_dim",) if config.has(key)}
    if len(set(said.values())) > 1:
        raise config.refuse(list(said)[-1], f"says another width than {next(iter(said))}")
    return next(iter(said.values())) if said else _divided(config)


def _divided(config: Config, factor: int = 1) -> int:
    hidden, heads = factor * config.size("hidden_size"), config.size("num_attention_heads")
    if hidden % heads:
        raise InvalidError(
            config.field("hidden_size"), f"must be a multiple of {heads} attention heads"
        )
    return hidden // heads


# --- attention in every layer ---


def _plain(config: Config) -> list[Layer]:
    """Return the layers of a model that nobody knows and that has nothing but plain keys."""
    if config.nested:  # what is left out of it may be any default
        config.count("num_key_value_heads"), config.count("head_dim")
    return _grouped(config)


def _grouped(config: Config) -> list[Layer]:
    found = attending(config)
    return layers_of(found, kv(_kv_heads(config), _head_dim(config)))


def _all_heads(config: Config) -> list[Layer]:
    heads = config.size("num_attention_heads")
    return layers_of(attending(config), kv(heads, _head_dim(config)))


def _falcon(config: Config) -> list[Layer]:
    """Grouped in the new architecture, else one head for all queries, else all heads."""
    heads = config.size("num_attention_heads")
    grouped, multi_query = config.flag("new_decoder_architecture"), config.flag("multi_query")
    given = config.count("num_kv_heads") if config.has("num_kv_heads") else heads
    kv_heads = given if grouped else 1 if multi_query else heads
    return layers_of(attending(config), kv(kv_heads, _divided(config)))


def _multi_query(config: Config) -> list[Layer]:
    heads = 1 if config.flag("multi_query") else config.size("num_attention_heads")
    if config.get("num_key_value_heads") not in (None, heads):
        raise config.refuse("num_key_value_heads", f"must be {heads} with this multi_query")
    return layers_of(attending(config), kv(heads, _divided(config)))


def _chatglm(config: Config) -> list[Layer]:
    heads = config.size("num_attention_heads")
    if config.flag("multi_query_attention"):
        heads = config.count("multi_query_group_num")
    else:
        config.get("multi_query_group_num")
    return layers_of(attending(config), kv(heads, _head_dim(config, "kv_channels")))


def _attn_config(config: Config) -> list[Layer]:
    """Return the layers of MPT and DBRX, whose KV heads are in an object of their own."""
    heads = config.size("num_attention_heads")
    if config.has("attn_config"):
        inner = config.within("attn_config")
        kind = inner.get("attn_type") or "multihead_attention"
        if kind == "multiquery_attention":
            heads = 1
        elif inner.has("kv_n_heads"):
            heads = inner.count("kv_n_heads")
        elif kind not in {"multihead_attention", "grouped_query_attention"}:
            raise inner.refuse("attn_type", "is not understood")
    return layers_of(attending(config), kv(heads, _divided(config)))


def _openelm(config: Config) -> list[Layer]:
    """Return layers with KV heads of their own each."""
    heads, width = _per_layer(config, "num_kv_heads"), config.count("head_dim")
    return [Layer(Kind.FULL, kv(each, width)) for each in heads]


def _deci(config: Config) -> list[Layer]:
    heads = _per_layer(config, "num_key_value_heads_per_layer")
    return [Layer(Kind.FULL, kv(each, _head_dim(config))) for each in heads]


def _per_layer(config: Config, key: str) -> list[int]:
    numbers = config.items(key)
    whole = all(
        isinstance(each, int) and not isinstance(each, bool) and 1 <= each <= 4096
        for each in numbers
    )
    if not whole or len(numbers) != config.layers:
        raise config.refuse(key, f"must be a whole number for each of {config.layers} layers")
    return numbers


def _blocks(config: Config) -> list[Layer]:
    """Return the layers of an architecture search: some attend, with groups of their own."""
    blocks = config.items("block_configs")
    if len(blocks) != config.layers:
        raise config.refuse("block_configs", f"must be about {config.layers} layers")
    config.get("num_key_value_heads")
    return [_block(config, block) for block in blocks]


def _block(config: Config, block: object) -> Layer:
    attention = block.get("attention") if isinstance(block, dict) else None
    if not isinstance(attention, dict):
        raise config.refuse("block_configs", "must have attention in each block")
    if unknown := [key for key, value in attention.items() if value and key not in BLOCK_KEYS]:
        raise config.refuse("block_configs", f"{str(unknown[0])[:40]!r} is not understood")
    if attention.get("no_op") or attention.get("replace_with_linear"):
        return Layer(Kind.NONE)
    heads = config.size("num_attention_heads")
    group, kv_heads = attention.get("n_heads_in_group"), attention.get("num_key_value_heads")
    given = group if kv_heads is None else kv_heads
    if not isinstance(given, int) or isinstance(given, bool) or given < 1 or heads % given:
        raise config.refuse("block_configs", f"must divide {heads} attention heads")
    kind = Kind.SLIDING if attention.get("window_length") else Kind.FULL
    return Layer(kind, kv(heads // given if kv_heads is None else given, _head_dim(config)))


def _sliding_heads(config: Config) -> list[Layer]:
    """Return the layers of MiMo-V2: V narrower than K, twice the KV heads in sliding layers."""
    found = kinds(config, "hybrid_layer_pattern", "layer_types")
    if found is None:
        found = [
            Kind.FULL if i == 0 or not (i + 1) % 6 else Kind.SLIDING for i in range(config.layers)
        ]
    heads, k, v = _kv_heads(config), config.count("head_dim"), config.count("v_head_dim")
    own = config.has("swa_num_key_value_heads") or config.model_type != "mimo_v2_flash"
    sliding = kv(
        config.count("swa_num_key_value_heads") if own else 2 * heads,
        config.count("swa_head_dim") if config.has("swa_head_dim") else k,
        config.count("swa_v_head_dim") if config.has("swa_v_head_dim") else v,
    )
    config.get("swa_num_attention_heads"), config.get("attention_chunk_size")
    by_kind = {Kind.FULL: kv(heads, k, v), Kind.SLIDING: sliding}
    return [Layer(kind, by_kind[_attends(config, kind)]) for kind in found]


def _attends(config: Config, kind: Kind) -> Kind:
    if kind not in {Kind.FULL, Kind.SLIDING}:
        raise config.refuse("layer_types", f"a layer of kind {kind} is not understood here")
    return kind


def _step(config: Config) -> list[Layer]:
    """Return the layers of Step 3.5, whose sliding layers may have other KV heads."""
    extra = config.natural("num_nextn_predict_layers")
    words, layers = config.get("layer_types"), config.layers
    if isinstance(words, list) and len(words) == layers + extra:
        config = config.with_values(layer_types=words[:layers])
    full = kv(_kv_heads(config), _head_dim(config))
    sliding = full
    if config.has("attention_other_setting"):
        other = config.within("attention_other_setting")
        if other.get("attention_type") != "sliding_attention":
            raise other.refuse("attention_type", "must be sliding_attention")
        sliding = kv(other.count("num_attention_groups"), other.count("head_dim"))
    by_kind = {Kind.FULL: full, Kind.SLIDING: sliding}
    return [Layer(kind, by_kind[kind]) for kind in attending(config)]


# --- layers that share ---


def _gemma3n(config: Config) -> list[Layer]:
    last = config.natural("num_kv_shared_layers")
    return sharing(_grouped(config), _fewer(config, "num_kv_shared_layers", last))


def _gemma4(config: Config) -> list[Layer]:
    """Full layers have heads of another width, and perhaps another number; the last ones share."""
    found = kinds(config, "layer_types")
    if found is None:
        found = [Kind.FULL if not (i + 1) % 6 else Kind.SLIDING for i in range(config.layers)]
        found[-1] = Kind.FULL
    heads = _kv_heads(config)
    full_heads = config.get("num_global_key_value_heads")
    if config.flag("attention_k_eq_v") and full_heads is not None:
        full_heads = config.count("num_global_key_value_heads")
    else:
        full_heads = heads
    by_kind = {
        Kind.SLIDING: kv(heads, config.count("head_dim")),
        Kind.FULL: kv(full_heads, config.count("global_head_dim")),
    }
    layers = [Layer(kind, by_kind[_attends(config, kind)]) for kind in found]
    last = config.natural("num_kv_shared_layers")
    return sharing(layers, _fewer(config, "num_kv_shared_layers", last))


def _fewer(config: Config, key: str, number: int) -> int:
    if number >= config.layers:
        raise config.refuse(key, f"must be below {config.layers} layers")
    return number


def _cross_layer(config: Config) -> list[Layer]:
    """Return the layers of Hunyuan: with use_cla, a group of them reads the cache of its first."""
    factor = config.natural("cla_share_factor") or 1
    factor = factor if config.flag("use_cla") else 1
    planes = kv(_kv_heads(config), _head_dim(config, "head_dim", "attention_head_dim"))
    return [
        Layer(Kind.SHARED) if i % factor else Layer(kind, planes)
        for i, kind in enumerate(attending(config))
    ]


def _looped(config: Config) -> list[Layer]:
    """Return the layers of a model that runs all of them several times, each with its own KV."""
    return _grouped(config) * config.count("num_loops", MOST_LAYERS)


# --- latent attention ---


def _latent(config: Config) -> list[Layer]:
    """Return layers that keep one compressed row for all heads, or plain ones without a rank."""
    if not config.has("kv_lora_rank") or config.get("use_mla") is False:
        for key in ("qk_nope_head_dim", "qk_rope_head_dim"):
            if config.natural(key):
                raise config.refuse(key, "without kv_lora_rank is not understood")
        return layers_of(attending(config), kv(_kv_heads(config), _divided(config)))
    return layers_of(attending(config), _latent_planes(config))


def _latent_planes(config: Config) -> tuple[Plane, ...]:
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"):
        config.get(key)
    for key in ("q_lora_rank", "qk_nope_head_dim", "qk_head_dim", "use_mla", "hidden_size"):
        config.get(key)
    return latent(config.size("kv_lora_rank") + config.size("qk_rope_head_dim"))


def _latent_twice(config: Config) -> list[Layer]:
    """Return the layers of LongCat-Flash, which attend twice each."""
    return [layer for layer in _latent(config) for _ in range(2)]


def _indexed(config: Config) -> list[Layer]:
    """Return the layers of sparse attention: an indexer's key beside the latent row.

    The key has 1 byte an element and a scale of 4 bytes for each 128 (vLLM, DeepGEMM). A layer
    that shares the choice of an earlier one has no indexer.
    """
    width = config.count("index_head_dim")
    if width % INDEXER_BLOCK:
        raise config.refuse("index_head_dim", f"must be a multiple of {INDEXER_BLOCK}")
    config.get("index_n_heads"), config.get("index_topk")
    key = Plane("indexer", width, fixed_bytes=width + 4 * width // INDEXER_BLOCK)
    planes = _latent_planes(config)
    own = _indexers(config)
    return [
        Layer(kind, (*planes, key) if with_key else planes)
        for kind, with_key in zip(attending(config), own, strict=True)
    ]


def _indexers(config: Config) -> list[bool]:
    layers = config.layers
    words = config.get("indexer_types")
    if words is None:
        words = config.get("index_topk_pattern")
    if words is not None:
        known = {"full": True, "F": True, "shared": False, "S": False}
        if not isinstance(words, list | str) or not all(str(word) in known for word in words):
            raise config.refuse("indexer_types", "must be of full and shared")
        if len(words) != layers:
            raise config.refuse("indexer_types", f"must be about {layers} layers")
        return [known[word] for word in words]
    every = config.natural("index_topk_freq") or 1
    offset = config.natural("index_skip_topk_offset") if config.has("index_skip_topk_offset") else 2
    return [max(i - offset + 1, 0) % every == 0 for i in range(layers)]


# --- layers that keep a state ---


def _hybrid(*keys: str) -> Callable[[Config], list[Layer]]:
    """Return the rule of models whose attending layers are grouped, and the others have states."""

    def rule(config: Config) -> list[Layer]:
        return layers_of(hybrid(config, *keys), kv(_kv_heads(config), _head_dim(config)))

    return rule


def _everywhere(config: Config) -> list[Layer]:
    """Return the layers of Falcon-H1, which keep tokens and a state each."""
    planes = kv(_kv_heads(config), _head_dim(config))
    return [Layer(kind, planes, has_state=True) for kind in attending(config)]


def _nemotron_h(config: Config) -> list[Layer]:
    keys = ("hybrid_override_pattern", "layers_block_type", "layer_types")
    said = next((config.get(key) for key in keys if config.has(key)), None)
    if not config.has("num_hidden_layers") and isinstance(said, str | list):
        config = config.with_values(num_hidden_layers=len(said))
    found = hybrid(config, *keys)
    width = _head_dim(config, "attention_head_dim", "head_dim")
    return layers_of(found, kv(_kv_heads(config), width))


def _wide_heads(config: Config) -> list[Layer]:
    """Return the layers of Zamba: its attention reads the hidden state and the input beside it."""
    planes = kv(_kv_heads(config), _divided(config, 2))
    for key in ("attention_head_dim", "attention_hidden_size", "kv_channels"):
        config.get(key)
    found = hybrid(config, "layers_block_type")
    if config.has("hybrid_layer_ids"):
        ids = config.items("hybrid_layer_ids")
        if ids != [i for i, kind in enumerate(found) if kind is Kind.FULL]:
            raise config.refuse("hybrid_layer_ids", "says other layers than layers_block_type")
    return [
        Layer(kind, planes if kind is Kind.FULL else (), has_state=kind is Kind.FULL)
        for kind in found
    ]


def _kimi_linear(config: Config) -> list[Layer]:
    planes = _latent_planes(config)
    if config.has("layer_types"):
        config.get("linear_attn_config")
        return layers_of(hybrid(config, "layer_types"), planes)
    inner = config.within("linear_attn_config")
    numbers = inner.items("full_attn_layers")
    layers = config.layers
    if not all(type(each) is int and 1 <= each <= layers for each in numbers):
        raise inner.refuse("full_attn_layers", f"must list some of {layers} layers, from 1")
    found = [Kind.FULL if i + 1 in numbers else Kind.STATE for i in range(layers)]
    return layers_of(found, planes)


def _latent_groups(config: Config) -> list[Layer]:
    return layers_of(hybrid(config, "layer_types", "layer_group_size"), _latent_planes(config))


# --- attention to something else ---


def _mllama(config: Config) -> list[Layer]:
    """Layers that attend to the image keep its KV, once for a request, and no token's."""
    planes = kv(_kv_heads(config), _head_dim(config))
    found = kinds(config, "cross_attention_layers") or [Kind.FULL] * config.layers
    return layers_of(found, planes)


RULES: dict[str, Callable[[Config], list[Layer]]] = {
    "grouped": _grouped,
    "all_heads": _all_heads,
    "falcon": _falcon,
    "multi_query": _multi_query,
    "chatglm": _chatglm,
    "attn_config": _attn_config,
    "openelm": _openelm,
    "deci": _deci,
    "blocks": _blocks,
    "sliding_heads": _sliding_heads,
    "step": _step,
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
    "cross_layer": _cross_layer,
    "looped": _looped,
    "latent": _latent,
    "latent_twice": _latent_twice,
    "indexed": _indexed,
    "interval": _hybrid("layer_types", "full_attention_interval"),
    "layer_types": _hybrid("layer_types", "layers_block_type", "full_attn_idxs"),
    "listed": _hybrid("attn_layer_indices"),
    "period": _hybrid("attn_layer_period"),
    "type_list": _hybrid("layer_types", "attn_type_list"),
    "groups": _hybrid("layer_group_size"),
    "cycle": _hybrid("block_types"),
    "everywhere": _everywhere,
    "nemotron_h": _nemotron_h,
    "zamba": _wide_heads,
    "kimi_linear": _kimi_linear,
    "latent_groups": _latent_groups,
    "mllama": _mllama,
}
"""Rules by their name in data/models.toml."""


@cache
def table() -> Table:
    """Return the families that are known."""
    read = _toml()
    states = read["states"]
    families = {}
    for name, entry in read["families"].items():
        of_states = [states["ignores"]] if entry["rule"] in states["rules"] else []
        families[name] = Family(
            entry["rule"],
            entry["source"],
            entry.get("defaults", {}),
            entry.get("aliases", {}),
            (*of_states, *entry.get("ignores", ())),
            entry.get("mtp", ""),
        )
    return Table(families, read["wrapped"], frozenset(read["plain"]["keys"]))


@cache
def _refused() -> dict[str, str]:
    return {name: reason for reason, names in _toml()["refused"].items() for name in names}


@cache
def _toml() -> dict[str, Any]:
    return tomllib.loads(MODELS.read_text(encoding="utf-8"))
