"""Geometry: planes given or read from a model's config, and devices."""

from __future__ import annotations

import json

import pytest

from odma_service.errors import InvalidError
from odma_service.pool.geometry import PRESETS, Geometry, device
from odma_service.pool.models import Parallel, from_model_config
from odma_service.values import PlaneGroup

QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "num_hidden_layers": 61,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "max_position_embeddings": 163840,
    "torch_dtype": "bfloat16",
}


def read(config, ranks=0, element_bytes=0, **changes):
    return from_model_config(json.dumps(config | changes), element_bytes, Parallel(ranks))


def planes(config, *args, **changes):
    (group,) = read(config, *args, **changes).geometry.planes
    return group.count, group.bytes_per_token


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


# --- from a model's config ---


def test_the_papers_model_has_56_planes_of_1024_bytes():
    geometry, model_length_tokens = read(QWEN_7B)[:2]
    assert geometry == Geometry((PlaneGroup(56, 1024),))
    assert geometry.bytes_per_token == 57_344
    assert geometry.plane_count == 56
    assert model_length_tokens == 131_072


def test_ranks_share_the_kv_heads():
    assert planes(QWEN_7B, 2) == (56, 512)
    assert planes(QWEN_7B, 4) == (56, 256)


def test_heads_are_replicated_where_there_are_more_ranks():
    assert planes(QWEN_7B, 8) == planes(QWEN_7B, 4)


@pytest.mark.parametrize("ranks", [3, 6])
def test_heads_that_do_not_divide_are_refused(ranks):
    with pytest.raises(InvalidError) as caught:
        read(QWEN_7B, ranks)
    assert caught.value.field == "tensor_parallel"


def test_a_latent_cache_is_compressed_and_whole_on_every_rank():
    assert planes(DEEPSEEK_V3) == planes(DEEPSEEK_V3, 8) == (61, 1152)


def test_a_head_dimension_of_its_own_wins():
    assert planes(QWEN_7B, head_dim=64) == (56, 512)
    assert planes(QWEN_7B, head_dim=None) == (56, 1024)


def test_without_kv_heads_every_head_has_its_own():
    llama = without(QWEN_7B, "num_key_value_heads") | {"model_type": "llama"}
    assert planes(llama) == planes(without(llama, "model_type")) == (56, 28 * 128 * 2)


@pytest.mark.parametrize(
    ("name", "element_bytes"),
    [("float32", 4), ("float16", 2), ("bfloat16", 2), ("float8_e4m3fn", 1)],
)
def test_an_element_is_as_large_as_its_type(name, element_bytes):
    assert planes(QWEN_7B, torch_dtype=name) == (56, 512 * element_bytes)
    assert planes(without(QWEN_7B, "torch_dtype"), dtype=name) == (56, 512 * element_bytes)


def test_given_element_bytes_win_over_the_type():
    assert planes(QWEN_7B, 0, 1) == (56, 512)
    assert planes(without(QWEN_7B, "torch_dtype"), 0, 1) == (56, 512)


def test_a_nested_text_config_holds_the_language_model():
    outer = {"model_type": "vision", "torch_dtype": "bfloat16", "hidden_size": 1}
    nested = without(QWEN_7B, "torch_dtype") | {"head_dim": None}
    assert planes(outer, text_config=nested) == (56, 1024)


def test_a_config_without_a_model_length_says_so():
    assert read(without(QWEN_7B, "max_position_embeddings")).model_length_tokens is None


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 60_000, "9" * 5_000, "\ud800"])
def test_what_is_no_json_object_is_refused(text):
    with pytest.raises(InvalidError) as caught:
        from_model_config(text)
    assert caught.value.field == "config_json"


def test_a_config_has_a_largest_size():
    assert planes(QWEN_7B, comment="x" * 4_000_000) == (56, 1024)
    with pytest.raises(InvalidError, match="4,194,304 bytes"):
        read(QWEN_7B, comment="x" * 2**22)


@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "num_key_value_heads",
        "num_attention_heads",
        "hidden_size",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize(
    "value", [0, -1, True, 1.5, "28", [28], {}, 2**63, 10**400, float("inf"), float("nan")]
)
def test_a_number_that_makes_no_sense_names_its_key(key, value):
    with pytest.raises(InvalidError) as caught:
        read(QWEN_7B, **{key: value})
    assert caught.value.field == f"config_json.{key}"


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (QWEN_7B, "num_hidden_layers"),
        (QWEN_7B, "num_attention_heads"),
        (QWEN_7B, "hidden_size"),
        (QWEN_7B, "torch_dtype"),
        (DEEPSEEK_V3, "qk_rope_head_dim"),
    ],
)
def test_a_missing_key_is_named(config, key):
    for broken in (without(config, key), config | {key: None}):
        with pytest.raises(InvalidError) as caught:
            read(broken)
        assert caught.value.field == f"config_json.{key}"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"torch_dtype": "int4"}, "config_json.torch_dtype"),
        ({"torch_dtype": 16}, "config_json.torch_dtype"),
        ({"text_config": "x"}, "config_json.text_config"),
        ({"hidden_size": 3585}, "config_json.hidden_size"),
        (DEEPSEEK_V3 | {"kv_lora_rank": 0}, "config_json.kv_lora_rank"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "config_json.layer_types"),
        ({"layer_types": 3}, "config_json.layer_types"),
        ({"head_dim": 2**23}, "planes[0].bytes_per_token"),
    ],
)
def test_other_nonsense_is_named_too(changes, field):
    with pytest.raises(InvalidError) as caught:
        read(QWEN_7B, **changes)
    assert caught.value.field == field


@pytest.mark.parametrize("args", [(-1,), (4097,), (True,), (1, -1), (1, 17)])
def test_ranks_and_element_bytes_are_bounded(args):
    with pytest.raises(InvalidError):
        read(QWEN_7B, *args)


# --- planes ---


@pytest.mark.parametrize(
    ("groups", "field"),
    [
        ([], "planes"),
        ([PlaneGroup(1, 1)] * 65, "planes"),
        ([PlaneGroup(4096, 1), PlaneGroup(1, 1)], "planes"),
        ([PlaneGroup(1, 1), PlaneGroup(0, 1)], "planes[1].count"),
        ([PlaneGroup(4097, 1)], "planes[0].count"),
        ([PlaneGroup(1, 0)], "planes[0].bytes_per_token"),
        ([PlaneGroup(1, 2**24 + 1)], "planes[0].bytes_per_token"),
        ([PlaneGroup(1, 1, 0)], "planes[0].alignment_bytes"),
        ([PlaneGroup(1, 1, 48)], "planes[0].alignment_bytes"),
        ([PlaneGroup(1, 1, 2**21)], "planes[0].alignment_bytes"),
    ],
)
def test_planes_that_cannot_be_are_named(groups, field):
    with pytest.raises(InvalidError) as caught:
        Geometry(tuple(groups))
    assert caught.value.field == field


def test_a_block_has_to_keep_the_alignment():
    geometry = Geometry((PlaneGroup(56, 1024, 2048),))
    geometry.check_alignment(2)
    with pytest.raises(InvalidError, match=r"planes\[0\].alignment_bytes"):
        geometry.check_alignment(1)


def test_only_whole_tokens_fit():
    geometry = Geometry((PlaneGroup(2, 100),))
    assert geometry.tokens_in(1_000) == 5
    assert geometry.tokens_in(1_199) == 5


def test_another_geometry_has_another_digest():
    geometries = [
        Geometry((PlaneGroup(56, 1024),)),
        Geometry((PlaneGroup(56, 512),)),
        Geometry((PlaneGroup(28, 1024), PlaneGroup(28, 1024))),
        Geometry((PlaneGroup(56, 1024, 64),)),
    ]
    digests = {geometry.digest(tokens) for geometry in geometries for tokens in (16, 64)}
    assert len(digests) == 8
    assert all(0 <= digest < 2**64 for digest in digests)


def test_a_digest_stays_the_same_for_books_written_earlier():
    assert Geometry((PlaneGroup(56, 1024),)).digest(16) == 13511047335010797682


# --- devices ---


def test_a_copy_reads_and_writes_every_byte():
    x4 = device()
    assert x4 == device("mlu370-x4") == PRESETS["mlu370-x4"]
    assert x4.token_seconds(57_344) == pytest.approx(2 * 57_344 / (307.2e9 * x4.copy_efficiency))
    assert device("mlu370-x8").bandwidth_bytes_per_second == 614.4e9


def test_given_figures_win_over_the_presets():
    own = device("mlu370-x8", bandwidth_bytes_per_second=1e9, descriptor_seconds=0)
    assert (own.bandwidth_bytes_per_second, own.descriptor_seconds) == (1e9, 0)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"preset": "h100"}, "preset"),
        ({"bandwidth_bytes_per_second": 0}, "bandwidth_bytes_per_second"),
        ({"bandwidth_bytes_per_second": float("nan")}, "bandwidth_bytes_per_second"),
        ({"bandwidth_bytes_per_second": float("inf")}, "bandwidth_bytes_per_second"),
        ({"descriptor_seconds": -1e-9}, "descriptor_seconds"),
        ({"descriptor_seconds": float("nan")}, "descriptor_seconds"),
    ],
)
def test_a_figure_that_makes_no_sense_is_named(given, field):
    with pytest.raises(InvalidError) as caught:
        device(**given)
    assert caught.value.field == field
