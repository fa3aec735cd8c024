"""Export: weights to a model directory, proved to answer as the network that was trained.

Three answers are compared on real prompts before anything is written in its place: the
training framework's, with the weights as they are stored; onnxruntime's, from the graph; and
the service's, from the directory, by its own eyes. They may differ by rounding only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from odma_service._native.features import GROUPS, NO_ROW, STATS, see
from odma_service.errors import OdmaError
from odma_service.learning.predictor import (
    FORMAT,
    WINDOW,
    History,
    Predictor,
    PromptInput,
    seeing,
)
from odma_service.learning.runtime import onnxruntime
from odma_service.values import QUANTILE_LEVELS, Text
from predictor_onnx.graph import LARGE, build, quantised
from predictor_onnx.network import DIMS, Inputs, own, trusted
from predictor_onnx.rows import Floats
from predictor_onnx.train import Trained

ROUNDING = 1e-4
"""Most that two ways to the same log length may differ by on one machine."""

_TEXTS = (
    b"",
    b"Hi",
    b"Name the capital of France in one word.",
    b"Write a detailed essay of at least 2000 words about the history of bridges.",
    b"A farmer has 12 sheep and buys 7 more. He sells 5. How many are left? Think step by step.",
    b"def f(x):\n    return [y * 2 for y in x if y % 3]\n\nassert f([1, 2, 3, 4]) == ??",
    "Erkl\u00e4re den Unterschied zwischen \u00c4pfeln und \u5c0f\u9e21.".encode(),
    b"\t\n " * 40 + b'{"a": [1, 2, 3]}' * 200,
)
TEXTS = (None, *map(Text, _TEXTS))
PASTS: tuple[tuple[int, ...], ...] = (
    (),
    (3,),
    tuple(range(100, 400, 3)),
    (4, 4, 5, 6, 4, 900) * 10,
)


class Proof(NamedTuple):
    """How far answers differ, as log lengths, over the prompts that were tried."""

    prompts: int
    onnx_from_training: float
    service_from_training: float
    int8_from_float_mean: float
    int8_from_float_most: float


def export(
    trained: Trained, directory: Path, name: str, examples: Sequence[PromptInput]
) -> tuple[Predictor, Proof]:
    """Write a model directory, without a card, and return it as served, with the proof.

    `name` and a digest of the content make its version. Raises OdmaError if answers differ;
    the directory is without a config then, and cannot be served.
    """
    stored, rows, scales = _stored(trained)
    graph = build(_arrays(trained), trained.scale)
    embeddings = b"".join(
        (trained.row_of.astype("<u2").tobytes(), scales.astype("<f4").tobytes(), rows.tobytes())
    )
    config: dict[str, Any] = {
        "format": FORMAT,
        "version": f"{name}-{hashlib.sha256(graph + embeddings).hexdigest()[:8]}",
        "features": seeing(),
        "levels": list(QUANTILE_LEVELS),
        "window": WINDOW,
        "rows": len(rows),
        "dims": DIMS,
        "wide": [round(float(tokens), 3) for tokens in np.expm1(trained.scale.wide)],
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.onnx").write_bytes(graph)
    (directory / "embeddings.bin").write_bytes(embeddings)
    write_json(directory / "config.json", config)
    (directory / "card.md").touch()
    _write_reference(stored, directory)
    served = Predictor.load(directory)
    proof = _prove(trained, stored, directory, served, examples)
    if max(proof.onnx_from_training, proof.service_from_training) > ROUNDING:
        (directory / "config.json").unlink()
        raise OdmaError(f"the exported model differs from the one that was trained: {proof}")
    config["proof"] = proof._asdict()
    config["float32_bytes"] = 4 * sum(
        np.asarray(part).size for part in (*stored.weights.values(), stored.table)
    )
    write_json(directory / "config.json", config)
    return served, proof


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write one JSON object for people and machines."""
    file.write_text(json.dumps(values, indent=1) + "\n")


def answers(trained: Trained, prompts: Sequence[PromptInput]) -> Floats:
    """Return what the training framework says: rows of seven log lengths."""
    known = trained.row_of != NO_ROW
    pooled = np.zeros((len(prompts), GROUPS, DIMS), np.float32)
    shares = np.zeros((len(prompts), GROUPS), np.float32)
    stats = np.zeros((len(prompts), STATS), np.float32)
    for i, (text, prompt_tokens, _) in enumerate(prompts):
        seen = see(text.data if text else b"", prompt_tokens)
        if text is None:
            stats[i, 0] = seen.stats[0]
            continue
        stats[i] = seen.stats
        for g, ids in enumerate(seen.ids):
            if known[ids].any():
                pooled[i, g] = trained.table[trained.row_of[ids[known[ids]]]].mean(0)
                shares[i, g] = known[ids].mean()
    texts = np.array([[prompt.text is not None] for prompt in prompts], np.float32)
    pasts = [prompt.history for prompt in prompts]
    table = np.array([(h.mean, h.sd, *h.quantiles, h.count) for h in pasts], np.float32)
    inputs = Inputs(pooled.reshape(len(prompts), -1), shares, stats, texts, table)
    return np.asarray(trusted(trained.weights, own(trained.weights, trained.scale, inputs)))


def _arrays(trained: Trained) -> dict[str, Floats]:
    return {key: np.asarray(value) for key, value in trained.weights.items()}


def _stored(trained: Trained) -> tuple[Trained, NDArray[np.int8], Floats]:
    """Return what was trained as it is once stored, and the embeddings as int8 with scales."""
    rows, scales = quantised(trained.table)
    weights = dict(trained.weights)
    for name in LARGE:
        whole, steps = quantised(np.asarray(weights[name]))
        weights[name] = jnp.asarray(whole * steps)
    return replace(trained, weights=weights, table=rows * scales), rows, scales


def _write_reference(stored: Trained, directory: Path) -> None:
    prompts = [
        PromptInput(text, len(text or b"four") // 4, History.of(past))
        for text in TEXTS
        for past in PASTS
    ]
    examples = [
        {
            "text": None if prompt.text is None else prompt.text.data.decode(),
            "prompt_tokens": prompt.prompt_tokens,
            "history": asdict(prompt.history),
            "quantiles": [round(float(np.expm1(value)), 4) for value in row],
        }
        for prompt, row in zip(prompts, answers(stored, prompts), strict=True)
    ]
    write_json(directory / "reference.json", {"examples": examples})


def _prove(
    trained: Trained,
    stored: Trained,
    directory: Path,
    served: Predictor,
    prompts: Sequence[PromptInput],
) -> Proof:
    wanted = answers(stored, prompts)
    session = onnxruntime().InferenceSession(directory / "model.onnx")
    [graphs] = session.run(None, {"inputs": served.inputs(prompts)})
    services = np.log1p(np.array(served.predict(prompts)))
    moved = np.abs(answers(trained, prompts) - wanted)
    return Proof(
        len(prompts),
        float(np.abs(graphs - wanted).max()),
        float(np.abs(services - wanted).max()),
        float(moved.mean()),
        float(moved.max()),
    )
