"""`odma geometry`: planes, what fits and why, or one sentence and 1."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
SLIDING = LLAMA | {
    "model_type": "gpt_oss",
    "head_dim": 64,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 16,
}
HYBRID = LLAMA | {"model_type": "jamba", "attn_layer_period": 8, "attn_layer_offset": 4}


def run(config, *options):
    text = config if isinstance(config, str) else json.dumps(config)
    return subprocess.run(
        [sys.executable, "-m", "odma_service", "geometry", "-", *options],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )


def facts(config, *options):
    ran = run(config, *options, "--json")
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_the_planes_of_a_model_and_what_fits():
    found = facts(LLAMA, "--memory", "24GB", "--requests", "64")
    assert found["planes"] == [{"count": 64, "bytes_per_token": 2048}]
    assert (found["plane_count"], found["bytes_per_token"], found["bytes_per_slot"]) == (
        64,
        131_072,
        0,
    )
    assert found["capacity_tokens"] == 24_000_000_000 // 131_072 // 16 * 16
    assert found["longest_requests"] == found["capacity_tokens"] // 8192
    assert found["tokens_per_request"] == found["capacity_tokens"] // 64
    assert any("8 KV heads" in line for line in found["why"])


def test_people_read_the_same_with_the_reason():
    ran = run(LLAMA, "--memory", "24GB")
    assert ran.returncode == 0
    assert "64 planes of 2,048 bytes a token" in ran.stdout
    assert "why: model_type llama: Transformers models/llama" in ran.stdout


def test_ranks_divide_heads_and_layers():
    assert facts(LLAMA, "--tensor-parallel", "4")["bytes_per_token"] == 32_768
    assert facts(LLAMA, "--pipeline-parallel", "4", "--rank", "3")["plane_count"] == 16
    assert facts(LLAMA, "--pipeline-layers", "20,12", "--rank", "1")["plane_count"] == 24


def test_an_element_may_be_overruled():
    assert facts(LLAMA, "--element-bytes", "1")["bytes_per_token"] == 65_536


def test_a_state_is_not_called_nothing():
    found = facts(HYBRID)
    assert found["bytes_per_slot"] is None
    assert any("slots are not built" in line for line in found["why"])


def test_a_ring_is_refused_where_a_layer_has_a_window():
    assert facts(SLIDING)["plane_count"] == 64
    assert facts(LLAMA, "--windows", "ring")["plane_count"] == 64
    ran = run(SLIDING, "--windows", "ring")
    assert ran.returncode == 1
    assert "slots are not built yet" in ran.stderr


@pytest.mark.parametrize(
    ("config", "options", "named"),
    [
        (LLAMA | {"num_loops": 2}, (), "config_json.num_loops"),
        ("{", (), "config_json"),
        (" " * (2**22 + 1), (), "4,194,304 bytes"),
        ({"torch_dtype": "int3"}, (), "config_json.torch_dtype"),
        (LLAMA, ("--tensor-parallel", "3"), "tensor_parallel"),
        (LLAMA, ("--tensor-parallel", "-1"), "tensor_parallel"),
        (LLAMA, ("--pipeline-parallel", "5"), "pipeline_parallel"),
        (LLAMA, ("--rank", "1"), "pipeline_rank"),
        (LLAMA, ("--pipeline-layers", "a,b"), "pipeline_layers"),
        (LLAMA, ("--memory", "many"), "memory"),
        (LLAMA, ("--memory", "24GB", "--requests", "-1"), "requests"),
        (LLAMA, ("--requests", "2"), "memory"),
        (LLAMA, ("--mtp",), "mtp"),
        (LLAMA, ("--windows", "half"), "windows"),
    ],
)
def test_a_refusal_is_one_sentence_and_1(config, options, named):
    ran = run(config, *options)
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1
    assert named in ran.stderr


def test_a_file_is_read_or_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | {"comment": "x" * 3_000_000}))
    command = [sys.executable, "-m", "odma_service", "geometry"]
    ran = subprocess.run(
        [*command, str(path), "--json"], capture_output=True, text=True, check=False
    )
    assert json.loads(ran.stdout)["bytes_per_token"] == 131_072
    ran = subprocess.run(
        [*command, str(tmp_path / "no")], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert "No such file" in ran.stderr
