"""Small decoders with random weights, loads for them, and what they answer alone."""

from __future__ import annotations

import random

import torch
from transformers import AutoConfig, AutoModelForCausalLM, logging

from odma_service.engines.transformers import EmbeddedPool, Engine, Planes, Request
from odma_service.values import PolicyChange

torch.set_num_threads(1)
logging.set_verbosity_error()

VOCABULARY = 300
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CAPACITY_TOKENS = 288
TIGHT = PolicyChange(name="elastic", step_tokens=16, safety_share=0)


def decoder(kind: str, **config: object) -> torch.nn.Module:
    """Return a decoder of a kind with random weights, the same each time."""
    torch.manual_seed(0)
    described = AutoConfig.for_model(kind, **{**SIZES, **config})
    model = AutoModelForCausalLM.from_config(described).float().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def requests(count: int = 12, seed: int = 2, prompt=(3, 40), output=(15, 60)) -> list[Request]:
    """Return requests that together are several times as large as the pool."""
    rng = random.Random(seed)
    return [
        Request(
            [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(*prompt))],
            rng.randint(*output),
        )
        for _ in range(count)
    ]


def alone(model: torch.nn.Module, asked: list[Request]) -> list[list[int]]:
    """Return what generate() answers to each request alone, by the model's own attention."""
    model.set_attn_implementation("eager")
    answers = []
    for request in asked:
        prompt = torch.tensor([request.prompt])
        with torch.inference_mode():
            all_tokens = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=request.most_tokens,
            )
        answers.append(all_tokens[0, prompt.shape[1] :].tolist())
    return answers


def serve(
    model: torch.nn.Module,
    asked: list[Request],
    planes: Planes | None = None,
    policy: PolicyChange = TIGHT,
) -> Engine:
    """Serve requests to their end in a pool of this process; return the engine."""
    planes = planes or Planes(model, CAPACITY_TOKENS)
    with EmbeddedPool(planes, policy) as pool:
        engine = Engine(model, planes, pool, batch_cap=8, prefill_tokens=24)
        for request in asked:
            engine.submit(request)
        while engine.busy:
            engine.step()
        pool.pool.check()
        assert pool.pool.report().live == 0
    return engine
