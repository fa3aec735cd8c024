"""`odma plan`: a model, a device and a load in; tokens, concurrency and tokens/s out."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from odma_service import replay, traces
from odma_service.cli.geometry import bytes_of, text_of
from odma_service.cli.options import AsJson, TraceFormat
from odma_service.cli.output import Facts, progress_bar, show
from odma_service.cli.replay import following, of_model, of_weights
from odma_service.errors import InvalidError
from odma_service.pool.models import ModelGeometry, Parallel, from_model_config
from odma_service.replay import plan
from odma_service.replay.workplace import workplace

INDEX = "model.safetensors.index.json"

app = typer.Typer()


@app.command()
def command(
    config: Annotated[Path, typer.Argument(help="A model's config.json.")],
    weights: Annotated[
        str,
        typer.Option(
            help=f"Bytes of the whole model: 15.2GB. Default: what {INDEX} beside the config says."
        ),
    ] = "",
    device: Annotated[
        str, typer.Option(help="LPDDR device: mlu370-x4, mlu370-x8 or a file like theirs.")
    ] = "mlu370-x4",
    memory: Annotated[
        str, typer.Option(help="Of a rank: 24GB, 512MiB or bytes. Default: the device's.")
    ] = "",
    reserve: Annotated[
        str, typer.Option(help="Of it, for activations and the runtime. Default: a tenth.")
    ] = "",
    peak_tflops: Annotated[
        float, typer.Option(min=1e-3, help="Peak compute of the device; half of it is assumed.")
    ] = 96.0,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Ranks that share each layer.")] = 1,
    windows: Annotated[
        str, typer.Option(help="whole: sliding layers keep every token; ring: their window only.")
    ] = "whole",
    trace: Annotated[
        Path | None, typer.Option(help="The load: a trace, see `odma trace describe`.")
    ] = None,
    form: TraceFormat = None,
    rows: Annotated[int | None, typer.Option(min=1, help="First rows of the trace only.")] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, max=2**20, help="Mean prompt, where there is no trace.")
    ] = 500,
    output_tokens: Annotated[
        int, typer.Option(min=1, max=2**20, help="Mean answer, where there is no trace.")
    ] = 300,
    max_output: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens of an answer. Default: the longest, at least 4,096."),
    ] = None,
    batch_cap: Annotated[
        int, typer.Option(min=1, max=4_096, help="Most requests running at once.")
    ] = 256,
    page: Annotated[Path | None, typer.Option(help="File for the plan as one HTML page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Plan a pool: what fits beside a model's weights, and what each policy would give there."""
    part = Parallel(tensor_parallel, windows=windows)
    model = from_model_config(text_of(str(config)), 0, part)
    weight_bytes = (bytes_of(weights) if weights else _weights_beside(config)) // tensor_parallel
    serving = replay.Serving(device, peak_flops_per_second=peak_tflops * 1e12)
    serving = of_weights(of_model(serving, config, model.geometry), weight_bytes)
    memory_bytes = bytes_of(memory) if memory else serving.lpddr.memory_bytes
    reserve_bytes = bytes_of(reserve) if reserve else int(memory_bytes * plan.RESERVE_SHARE)
    division = plan.Division(memory_bytes, weight_bytes, reserve_bytes, model.geometry)
    load = (
        traces.read_trace(trace, rows, form)
        if trace
        else plan.load_of_lengths(prompt_tokens, output_tokens)
    )
    limits = replay.limits_for(
        load, division.capacity_tokens, max_output, model.model_length_tokens
    )
    setting = replay.Setting(limits, serving, batch_cap=batch_cap)
    with workplace() as directory, progress_bar(as_json) as progress:
        watch = following(progress, len(load))
        compared = replay.compare(
            load, list(plan.PLANNED), setting, replay.read_tuning(), directory, watch
        )
    facts = _facts(model, division, compared, part)
    if page:
        page.write_text(_page(facts))
        typer.echo(f"wrote {page}", err=as_json)
    show(facts, as_json, _picture)


def _weights_beside(config: Path) -> int:
    """Return the bytes of the weights that lie beside a config. Raises InvalidError."""
    path = config.parent / INDEX
    try:
        return int(json.loads(path.read_bytes())["metadata"]["total_size"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InvalidError("weights", f"has to be given: there is no {path} that says") from None


def _facts(
    model: ModelGeometry, division: plan.Division, compared: replay.Comparison, part: Parallel
) -> Facts:
    whole, limits = replay.as_object(compared), compared.setting.limits
    max_regions = max(1_024, 4 * compared.setting.batch_cap)
    states = "the engine holds states beside the pool: their bytes belong into --reserve"
    assumed = [
        "a closed loop over the lengths of the load, in its order: some request always waits",
        f"{division.reserve_bytes:,} bytes are kept for activations and the runtime",
        "two operations a token and weight of 2 bytes; half of the peak compute is reached",
        "the bandwidth is that of the LPDDR emulation; talk between ranks takes no time",
        "attention between tokens costs what it costs a 7B model; prompts are prefilled whole",
        "no KV is reused, and none is kept in the host's memory",
        *([states] if model.has_states else []),
    ]
    return {
        "model": compared.setting.serving.model,
        "device": str(compared.setting.serving.device),
        "ranks": part.tensor,
        **division.as_object(),
        "model_length_tokens": limits.model_length_tokens,
        "slots": None if model.has_states else 0,
        "max_regions": max_regions,
        "pool_file_bytes": division.books_bytes(limits.model_length_tokens, max_regions),
        "load": whole["trace"],
        "load_class": whole["load_class"],
        "requests": whole["requests"],
        "dropped": whole["dropped"],
        "policies": plan.expected(compared),
        "assumed": [*assumed, *whole["notes"]],
        "why": list(model.why),
    }


def _conclusion(facts: Facts) -> str:
    policies = facts["policies"]
    best = max(("static", "odma", "elastic"), key=lambda name: policies[name]["tokens_per_s"])
    got = policies[best]
    sentence = (
        f"{best} gives {got['tokens_per_s']:,.0f} tokens/s with {got['concurrency']:.1f} requests"
        f" at once, {got['over_static']:.2f} x static"
    )
    if facts["load_class"] != "memory-bound":
        sentence += "; memory is not what this load is short of"
    return sentence


def _sizes(facts: Facts) -> dict[str, str]:
    """Return the sizes of a plan, with their units, by name."""
    gigabytes = {
        name: f"{facts[f'{key}_bytes'] / 1e9:,.2f} GB"
        for name, key in (
            ("memory of a rank", "memory"),
            ("  weights", "weight"),
            ("  reserve", "reserve"),
            ("  KV", "kv"),
        )
    }
    slots = "not known: the engine holds the states" if facts["slots"] is None else "none"
    return {
        "model": f"{facts['model']} on {facts['device']}, {facts['ranks']} rank(s)",
        **gigabytes,
        "bytes a token": f"{facts['bytes_per_token']:,}",
        "capacity": f"{facts['capacity_tokens']:,} tokens",
        "longest request": f"{facts['model_length_tokens']:,} tokens",
        "slots": slots,
        "max_regions": f"{facts['max_regions']:,}",
        "pool file": f"{facts['pool_file_bytes'] / 1e6:,.2f} MB of the host's memory or disk",
        "load": f"{facts['load']}: {facts['requests']:,} requests, {facts['dropped']:,} never fit",
    }


HEADINGS = ("policy", "tokens/s", "x static", "running", "written", "TTFT p50/p99 s", "preempted")


def _row(name: str, got: Facts) -> tuple[str, ...]:
    return (
        name,
        f"{got['tokens_per_s']:,.0f}",
        f"{got['over_static']:.2f}",
        f"{got['concurrency']:.1f}",
        f"{got['written_share']:.0%}",
        f"{got['ttft_p50_s']:,.1f} / {got['ttft_p99_s']:,.1f}",
        f"{got['preemptions']:,.0f}",
    )


def _picture(facts: Facts) -> RenderableType:
    sizes = _sizes(facts)
    width = max(map(len, sizes))
    table = Table(HEADINGS[0])
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right")
    for name, got in facts["policies"].items():
        table.add_row(*_row(name, got))
    lines = [f"{name:{width}}  {value}" for name, value in sizes.items()]
    meanings = [f"{name}: {got['means']}" for name, got in facts["policies"].items()]
    return Group(
        Text(_conclusion(facts), style="bold"),
        *map(Text, lines),
        table,
        *map(Text, meanings),
        *(Text(f"assumed: {line}") for line in facts["assumed"]),
    )


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "th,td{border-bottom:1px solid #ccc;padding:.25em .7em;text-align:right}"
    "th:first-child,td:first-child{text-align:left}.wide{overflow-x:auto}"
)


def _page(facts: Facts) -> str:
    """Return the plan as an HTML page that needs nothing else."""

    def rows(cells: list[tuple[str, ...]], tag: str = "td") -> str:
        return "".join(
            "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"
            for row in cells
        )

    def listed(lines: list[str]) -> str:
        return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"

    policies = facts["policies"].items()
    table = rows([HEADINGS], "th") + rows([_row(name, got) for name, got in policies])
    sizes = rows(list(_sizes(facts).items()))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>odma plan</title><style>{STYLE}</style><h1>{escape(_conclusion(facts))}</h1>"
        f'<div class="wide"><table>{table}</table></div>'
        + listed([f"{name}: {got['means']}" for name, got in policies])
        + f'<h2>Sizes</h2><div class="wide"><table>{sizes}</table></div>'
        f"<h2>Assumed</h2>{listed(facts['assumed'])}<h2>Geometry</h2>{listed(facts['why'])}</html>\n"
    )
