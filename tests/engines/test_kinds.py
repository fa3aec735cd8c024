"""Decoders of many kinds answer over moving memory what they answer alone, token for token."""

from __future__ import annotations

import re

import pytest
from decoders import alone, decoder, requests, serve
from paths import DOCS

from odma_service.engines.transformers import Planes
from odma_service.errors import UnfitModelError

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"sliding_window": 24}
GLOBAL_EVERY_OTHER = ["sliding_attention", "full_attention", "sliding_attention"]
PER_LAYER = {
    "head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 300,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    **WINDOW,
}
GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}

EQUAL = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "cohere": {},
    "cohere2": WINDOW,
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone": {},
    "exaone4": WINDOW,
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, **WINDOW},
    "gemma3_text": {"head_dim": 16, "layer_types": GLOBAL_EVERY_OTHER, **WINDOW},
    "gemma3n_text": {
        **PER_LAYER,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [128] * 4,
        "laurel_rank": 4,
    },
    "gemma4_text": {**PER_LAYER, "global_head_dim": 32, "num_kv_shared_layers": 2},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "gpt2": GPT,
    "gpt_bigcode": {},
    "gpt_neox": {"num_key_value_heads": 4},
    "gpt_oss": {"head_dim": 16, "layer_types": GLOBAL_EVERY_OTHER, **WINDOW, **EXPERTS},
    "gptj": {**GPT, "rotary_dim": 8},
    "granite": {},
    "granitemoe": {},
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "internlm3": {},
    "jetmoe": {},
    "lfm2": {},
    "llama": {},
    "llama4_text": {
        "head_dim": 16,
        "num_local_experts": 4,
        "intermediate_size_mlp": 128,
        "attention_chunk_size": 32,
    },
    "minimax_m2": {"head_dim": 16, "rotary_dim": 8, **EXPERTS},
    "ministral": {"head_dim": 16, **WINDOW},
    "ministral3": {},
    "mistral": {"head_dim": 16, **WINDOW},
    "mixtral": {**WINDOW, **EXPERTS},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"layer_types": GLOBAL_EVERY_OTHER, **WINDOW},
    "olmoe": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "persimmon": {},
    "phi": {},
    "phi3": WINDOW,
    "phimoe": {"num_local_experts": 4, **WINDOW},
    "qwen2": {},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "use_sliding_window": True,
        "max_window_layers": 0,
        **WINDOW,
    },
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "seed_oss": {"head_dim": 16},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": WINDOW,
    "vaultgemma": {},
}
"""What a config needs beside SIZES, to be small and to use what is special in its kind."""

NO_INTERFACE = "does not use the attention interface"
STATE = "keep a state that is not made of tokens"
OTHERWISE = "pieces of a prompt give another result than the whole"
TWICE = "a layer attends more than once"
REFUSED = {
    "bert": ({}, "its tokens see later ones"),
    "bloom": ({"n_head": 4, "n_layer": 3}, NO_INTERFACE),
    "diffllama": ({}, TWICE),
    "doge": ({}, "makes a mask of its own"),
    "falcon": ({}, NO_INTERFACE),
    "falcon_h1": ({}, OTHERWISE),
    "mamba": ({}, NO_INTERFACE),
    "mpt": ({"d_model": 64, "n_heads": 4, "n_layers": 3}, NO_INTERFACE),
    "qwen3_5_text": ({"head_dim": 16, "num_hidden_layers": 4}, STATE),
}


@pytest.mark.parametrize("kind", EQUAL)
def test_a_kind_answers_what_it_answers_alone(kind):
    model = decoder(kind, **EQUAL[kind])
    asked = requests()
    expected = alone(model, asked)
    counts = serve(model, asked).counts
    assert [request.output for request in asked] == expected
    assert counts["copies"] > counts["overlapping_copies"] > 0
    assert counts["preempted"] > 0
    assert counts["mixed_steps"] > 0


@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_that_cannot_be_served_is_refused_by_name(kind):
    config, rule = REFUSED[kind]
    model = decoder(kind, **config)
    with pytest.raises(UnfitModelError, match=rule) as refused:
        Planes(model, 64)
    assert refused.value.kind == kind


def test_the_guide_names_these_kinds():
    page = (DOCS / "guides" / "transformers.md").read_text()
    assert set(re.findall(r"`(\w+)`", re.search(r"^\| equal \|.*$", page, re.MULTILINE)[0])) == set(
        EQUAL
    )
    refused = "".join(re.findall(r"^\| refused: .*$", page, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", refused)) == set(REFUSED)
