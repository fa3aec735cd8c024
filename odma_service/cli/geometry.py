"""`odma geometry`: what a model's config.json means for a pool's memory, without a server."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from odma_service.cli.failures import bad_result
from odma_service.cli.options import AsJson
from odma_service.cli.output import Facts, show
from odma_service.errors import InvalidError
from odma_service.pool.models import (
    MOST_CONFIG_BYTES,
    ModelGeometry,
    Parallel,
    from_model_config,
)

BLOCK_TOKENS = 16
UNITS = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}

app = typer.Typer()


@app.command()
def command(
    config: Annotated[str, typer.Argument(help="A model's config.json; -: from standard input.")],
    tensor_parallel: Annotated[
        int, typer.Option(help="Ranks that share the KV heads of each layer.")
    ] = 1,
    pipeline_parallel: Annotated[
        int, typer.Option(help="Ranks that share the layers. 0: one, or as --pipeline-layers.")
    ] = 0,
    rank: Annotated[int, typer.Option(help="Which of these ranks, from 0.")] = 0,
    pipeline_layers: Annotated[
        str, typer.Option(help="Layers of each such rank, where they are not even: 31,30.")
    ] = "",
    windows: Annotated[
        str, typer.Option(help="whole: sliding layers keep every token; ring: their window only.")
    ] = "whole",
    mtp: Annotated[bool, typer.Option(help="With the layers of multi-token prediction.")] = False,
    element_bytes: Annotated[
        int, typer.Option(help="Bytes of an element of the cache. 0: as the config says.")
    ] = 0,
    memory: Annotated[
        str, typer.Option(help="What a rank has for the cache: 24GB, 512MiB or bytes.")
    ] = "",
    requests: Annotated[
        int, typer.Option(help="Requests that live at once; divides the tokens. 0: unknown.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Show the planes of a model, what fits, and why; 1 if the config is refused."""
    text = text_of(config)
    with bad_result(InvalidError):
        part = Parallel(
            tensor_parallel,
            pipeline_parallel,
            rank,
            _numbers(pipeline_layers),
            mtp,
            windows,
        )
        model = from_model_config(text, element_bytes, part)
        facts = _facts(model) | _fitting(model, memory, requests)
    show(facts, as_json, _picture)


def text_of(config: str) -> str:
    """Return the text; one byte above the limit is read, so that it is refused as too long."""
    with nullcontext(sys.stdin.buffer) if config == "-" else Path(config).open("rb") as stream:
        return stream.read(MOST_CONFIG_BYTES + 1).decode(errors="replace")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in text.split(",")) if text else ()
    except ValueError:
        raise InvalidError("pipeline_layers", f"whole numbers, not {text!r}") from None


def bytes_of(text: str) -> int:
    """Return the bytes of a size.

    >>> bytes_of("24GB"), bytes_of("1.5 GiB"), bytes_of("1024")
    (24000000000, 1610612736, 1024)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)(i?)B?", text.strip())
    if match is None:
        raise InvalidError("memory", f"a size such as 24GB or 512MiB, not {text!r}")
    number, unit, binary = match.groups()
    base = 1024 if binary else 1000
    return int(float(number) * (base ** UNITS[unit] if unit else 1))


def _facts(model: ModelGeometry) -> Facts:
    geometry = model.geometry
    return {
        "planes": [
            {"count": group.count, "bytes_per_token": group.bytes_per_token}
            for group in geometry.planes
        ],
        "plane_count": geometry.plane_count,
        "bytes_per_token": geometry.bytes_per_token,
        "bytes_per_slot": None if model.has_states else 0,
        "model_length_tokens": model.model_length_tokens,
        "why": list(model.why),
    }


def _fitting(model: ModelGeometry, memory: str, requests: int) -> Facts:
    if requests < 0:
        raise InvalidError("requests", f"0 or more, not {requests}")
    if not memory:
        if requests:
            raise InvalidError("memory", "is needed to say what fits")
        return {}
    tokens = model.geometry.tokens_in(bytes_of(memory)) // BLOCK_TOKENS * BLOCK_TOKENS
    fitting: Facts = {"memory_bytes": bytes_of(memory), "capacity_tokens": tokens}
    if model.model_length_tokens:
        fitting["longest_requests"] = tokens // model.model_length_tokens
    if requests:
        fitting["tokens_per_request"] = tokens // requests
    return fitting


def _picture(facts: Facts) -> str:
    lines = [f"{each['count']} planes of {each['bytes_per_token']:,}" for each in facts["planes"]]
    slot = "not known: the engine holds the states" if facts["bytes_per_slot"] is None else "0"
    length = facts["model_length_tokens"]
    shown = {
        "planes": ", ".join(lines) + " bytes a token",
        "bytes a token": f"{facts['bytes_per_token']:,}",
        "bytes a slot": slot,
        "model length": "not said" if length is None else f"{length:,} tokens",
    }
    names = {
        "capacity_tokens": "fits",
        "longest_requests": "  of full length",
        "tokens_per_request": "  a request",
    }
    for key, name in names.items():
        if key in facts:
            unit = "requests" if key == "longest_requests" else "tokens"
            shown[name] = f"{facts[key]:,} {unit}"
    width = max(map(len, shown))
    table = [f"{name:{width}}  {value}" for name, value in shown.items()]
    return "\n".join([*table, *(f"why: {line}" for line in facts["why"])])
