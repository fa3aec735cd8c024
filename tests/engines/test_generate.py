"""`odma generate` answers, and says why it cannot."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import NamedTuple

import pytest
import torch
from decoders import decoder
from transformers import AutoModelForCausalLM, AutoTokenizer

from odma_service.__main__ import main


class Ran(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def odma(monkeypatch, capsys):
    """Return a function that runs a command here: torch takes long to import."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["odma", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return Ran(ended.value.code or 0, told.out, told.err)

    return run


@pytest.fixture
def generate(odma):
    return partial(odma, "generate")


def lines(ran):
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_prompts_are_answered_as_transformers_answers_them(generate, model_dir):
    prompts = ("Hello", "What is a region?")
    *answers, counts = lines(generate(model_dir, *prompts, "--max-tokens", 12, "--json"))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([tokenizer(prompt).input_ids])
        whole = model.generate(tokens, do_sample=False, max_new_tokens=12, pad_token_id=0)
        assert answer["answer"] == tokenizer.decode(whole[0, tokens.shape[1] :])
        assert answer["end"] == "HIT_LIMIT"
    assert counts["generated"] == 24


def test_a_service_places_the_cache(generate, model_dir, server, service, name):
    ran = generate(
        model_dir, "Hello", "--chat", "--target", server.target, "--pool", name, "--json"
    )
    assert lines(ran)[0]["output_tokens"] == 64
    assert service.get_pool(name).counters.hit_limit == 1


def test_an_answer_for_people_is_a_text(generate, model_dir):
    ran = generate(model_dir, "Hello", "--max-tokens", 5)
    assert ran.stdout.startswith("> Hello\n")
    assert len(ran.stdout.splitlines()[1]) == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("Hello", "--max-tokens", "600"), "most_tokens: at most 512 tokens together"),
        (("",), "prompt: at least 1 token"),
        (("Hello", "--dtype", "int3"), "dtype: one of auto, float32"),
        (("Hello", "--policy", "best"), "one of static, s3, odma, elastic"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(generate, model_dir, arguments, said):
    ran = generate(model_dir, *arguments)
    assert ran.returncode == 2
    assert said in ran.stderr


def test_a_place_without_a_model_is_said(generate, tmp_path):
    ran = generate(tmp_path / "nothing", "Hello")
    assert ran.returncode == 2
    assert "nothing" in ran.stderr


def test_a_model_that_cannot_be_served_is_refused_by_its_kind(generate, tmp_path, model_dir):
    decoder("bloom", n_head=4, n_layer=3).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path)
    ran = generate(tmp_path, "Hello")
    assert ran.returncode == 2
    assert "a model of kind 'bloom' cannot be served" in ran.stderr


def test_a_server_beyond_the_loopback_wants_to_be_told(odma, model_dir):
    ran = odma("serve-model", model_dir, "--listen", "0.0.0.0:0")
    assert ran.returncode == 2
    assert "beyond the loopback only with --allow-insecure" in ran.stderr
