"""`odma plan`: bytes that add up, policies as the replay has them, or one sentence and 2."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from odma_service.replay.plan import LENGTHS_ROWS, load_of_lengths

QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "torch_dtype": "bfloat16",
}
HYBRID = QWEN_7B | {"model_type": "jamba", "attn_layer_period": 8, "attn_layer_offset": 4}
SMALL = ("--memory", "17GB", "--reserve", "1GB", "--prompt-tokens", "200", "--output-tokens", "60")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN_7B))
    return path


def odma(*words):
    return subprocess.run(
        [sys.executable, "-m", "odma_service", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )


def planned(*words):
    ran = odma("plan", *words, "--json")
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "load.csv"
    rows = "".join(f"{i},{100 + i % 90},{20 + i * 7 % 200}\n" for i in range(160))
    path.write_text(f"arrived_at,num_prefill_tokens,num_decode_tokens\n{rows}")
    return path


def test_the_bytes_add_up_and_the_policies_are_those_of_the_replay(config, trace):
    plan = planned(config, "--weights", "15.2GB", *SMALL, "--trace", trace)
    assert plan["memory_bytes"] - plan["weight_bytes"] - plan["reserve_bytes"] == 800_000_000
    assert plan["bytes_per_token"] == 57_344
    assert plan["capacity_tokens"] == 800_000_000 // 57_344 // 16 * 16
    assert plan["kv_bytes"] == plan["capacity_tokens"] * 57_344
    assert plan["pool_file_bytes"] > 0
    assert plan["slots"] == 0
    replayed = odma(
        *("replay", trace, "--policy", ",".join(plan["policies"]), "--json"),
        *("--capacity-tokens", plan["capacity_tokens"], "--model", config),
        *("--weights-gbytes", 15.2, "--model-length", plan["model_length_tokens"]),
    )
    policies = json.loads(replayed.stdout)["policies"]
    for name, got in plan["policies"].items():
        assert got["tokens_per_s"] == policies[name]["tokens_per_s"]
        assert got["concurrency"] == policies[name]["mean_running"]


def test_ranks_share_weights_and_kv(config, trace):
    one = planned(config, "--weights", "15.2GB", *SMALL, "--trace", trace)
    two = planned(config, "--weights", "15.2GB", *SMALL, "--trace", trace, "--tensor-parallel", 2)
    assert two["weight_bytes"] * 2 == one["weight_bytes"]
    assert two["bytes_per_token"] * 2 == one["bytes_per_token"]
    assert two["capacity_tokens"] > 20 * one["capacity_tokens"]


def test_the_weights_beside_a_config_are_found(config, trace):
    index = config.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 15_000_000_000}}))
    assert planned(config, *SMALL, "--trace", trace)["weight_bytes"] == 15_000_000_000


def test_states_are_said_to_be_the_engine_s(config, trace):
    config.write_text(json.dumps(HYBRID))
    plan = planned(config, "--weights", "15GB", *SMALL, "--trace", trace)
    assert plan["slots"] is None
    assert any("states" in line for line in plan["assumed"])


def test_the_page_has_the_figures_and_loads_nothing(config, trace, tmp_path):
    page = tmp_path / "plan.html"
    plan = planned(config, "--weights", "15.2GB", *SMALL, "--trace", trace, "--page", page)
    text = page.read_text()
    for got in plan["policies"].values():
        assert f"<td>{got['tokens_per_s']:,.0f}</td>" in text
    assert not re.search(r"(src|href)=|https?:|@import|url\(", text)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "weights: has to be given"),
        (["--weights", "24GB", "--memory", "24GB"], "not one block of KV"),
        (["--weights", "much"], "a size such as 24GB"),
    ],
)
def test_what_cannot_be_planned_is_one_line(config, words, sentence):
    ran = odma("plan", config, *words)
    assert ran.returncode == 2
    assert sentence in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_made_up_lengths_have_the_mean_that_was_asked_for():
    load = load_of_lengths(500, 300)
    assert len(load) == LENGTHS_ROWS
    assert load.input_tokens.mean() == pytest.approx(500, rel=0.06)
    assert load.output_tokens.mean() == pytest.approx(300, rel=0.06)
