"""`odma bench predictor`: the cost of a prediction on one core, features included."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from odma_service.cli.options import AsJson
from odma_service.cli.output import show
from odma_service.errors import InvalidError
from odma_service.learning.predictor import History, Predictor, PromptInput, default_model
from odma_service.values import Text

BATCHES = (1, 8, 64)
PROMPTS = 512
WORDS = [
    "write",
    "explain",
    "the",
    "a",
    "of",
    "list",
    "three",
    "reasons",
    "why",
    "story",
    "about",
    "function",
    "returns",
    "sum",
    "number",
    "how",
    "many",
    "people",
    "if",
    "each",
    "costs",
    "12",
    "dollars",
    "and",
    "7",
    "more",
    "find",
    "value",
    "x",
    "step",
    "by",
    "final",
    "answer",
    "code",
]


app = typer.Typer()


@app.command()
def command(
    model: Annotated[
        Path | None, typer.Option(help="A model directory. Default: the shipped model.")
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(help="Parquet file to take prompts from. Default: generated prompts."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds for each batch size.")] = 3.0,
    as_json: AsJson = False,
) -> None:
    """Measure a prediction at batches of 1, 8 and 64, the model's size and the effect of int8."""
    directory = model or default_model()
    served = Predictor.load(directory)
    texts = made_prompts() if rows is None else _prompts_of(rows)
    past = History.of(range(50, 650, 6))
    prompts = [PromptInput(Text(text), len(text) // 4, past) for text in texts]
    config = json.loads((directory / "config.json").read_text())
    figures: dict[str, Any] = {
        "model_version": served.version,
        "prompts": len(prompts),
        "median_prompt_bytes": int(np.median([len(text) for text in texts])),
        "per_prompt": {str(size): _timed(served, prompts, size, seconds) for size in BATCHES},
        "model_bytes": sum(file.stat().st_size for file in directory.iterdir()),
        "weights_bytes": sum(
            (directory / name).stat().st_size for name in ("model.onnx", "embeddings.bin")
        ),
        "float32_weights_bytes": config.get("float32_bytes"),
        "int8_against_float32": config.get("proof"),
    }
    show(figures, as_json)


def made_prompts() -> list[bytes]:
    """Return prompts of 20 to 2,000 bytes, half of them under 270."""
    random = np.random.default_rng(7)
    words = np.exp(random.normal(np.log(46), 1.0, PROMPTS)).clip(4, 350).astype(int)
    return [" ".join(random.choice(WORDS, count)).encode() for count in words]


def _prompts_of(file: Path) -> list[bytes]:
    from predictor_onnx.rows import read_rows

    prompts = list(read_rows(file).prompts)
    if not prompts:
        raise InvalidError(str(file), "no rows")
    chosen = np.random.default_rng(7).choice(len(prompts), min(PROMPTS, len(prompts)), False)
    return [prompts[i] for i in chosen]


def _timed(
    served: Predictor, prompts: list[PromptInput], size: int, seconds: float
) -> dict[str, float]:
    """Return milliseconds of wall time per prompt, over calls of `size` prompts."""
    taken: list[float] = []
    batches = [
        [prompts[(start + i) % len(prompts)] for i in range(size)]
        for start in range(0, len(prompts), size)
    ]
    for batch in batches[:32]:
        served.predict(batch)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for batch in batches:
            unseen = [
                prompt._replace(text=prompt.text and Text(prompt.text.data)) for prompt in batch
            ]
            started = time.perf_counter()
            served.predict(unseen)
            taken.append((time.perf_counter() - started) / size * 1e3)
    p50, p99 = np.quantile(taken, (0.5, 0.99))
    return {"p50_ms": round(float(p50), 4), "p99_ms": round(float(p99), 4)}
