"""A model and its tokenizer, from a directory, a hub's name or a GGUF file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from odma_service.errors import InvalidError, OdmaError

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Loaded(NamedTuple):
    """What serves texts. `stop_tokens` end an answer; `name` is what its users call it."""

    name: str
    model: Any
    tokenizer: Any
    stop_tokens: frozenset[int]


def load(source: str, *, dtype: str = "auto", device: str = "cpu") -> Loaded:
    """Return the model at `source`: a directory, a name of a hub, or a file *.gguf.

    Code that lies beside a model is never run. Raises InvalidError for an unknown dtype,
    OSError where there is no model, OdmaError for one that cannot be read.
    """
    if dtype not in DTYPES:
        raise InvalidError("dtype", f"one of {', '.join(DTYPES)}, not {dtype!r}")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    path = Path(source)
    place, file = (str(path.parent), path.name) if path.suffix == ".gguf" else (source, None)
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=chosen)
        model = model.to(device).eval()
    except (ImportError, KeyError, RuntimeError, ValueError) as error:
        raise OdmaError(f"the model {source} cannot be read: {error}") from error
    stops = stop_tokens(model.generation_config, tokenizer)
    return Loaded(path.stem or source, model, tokenizer, stops)


def stop_tokens(generation: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: those of the model and the tokenizer's."""
    of_model = generation.eos_token_id
    several = of_model if isinstance(of_model, list) else [of_model]
    return frozenset({*several, tokenizer.eos_token_id} - {None})
