"""`odma predictor stream`: cost and coverage of predictions while the kind of prompt changes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Group, RenderableType
from rich.table import Table

from lab.stream.stream import AHEAD, RECOVERED, Kind, Phase, phase_of, serve_stream
from odma_service.cli.options import AsJson
from odma_service.cli.output import show
from odma_service.errors import InvalidError
from odma_service.learning.predictor import Predictor, default_model
from predictor_onnx.rows import Rows, read_rows

END_BYTES = 4_096
HEADINGS = ("phase", "requests", "coverage", "reserved/actual", "first 100", "window", "recovery")
FIGURES = {
    "coverage": ".3f",
    "reserved_over_actual": ".2f",
    "first_100_coverage": ".2f",
    "window_share": ".0%",
}


app = typer.Typer()


@app.command()
def command(
    file: Annotated[
        list[str],
        typer.Argument(help="Parquet files, one phase each. FILE:MODEL takes one model's rows."),
    ],
    delay: Annotated[
        str,
        typer.Option(help="Requests until an answer of mean length is there, divided by commas."),
    ] = "0",
    target: Annotated[
        float, typer.Option(min=0.5, max=0.99, help="Share of answers that should fit.")
    ] = 0.95,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Shuffles of each phase.")] = 3,
    rows: Annotated[int, typer.Option(min=1, help="Most rows of a phase.")] = 1_500,
    warmup: Annotated[
        int, typer.Option(min=0, help="First requests of the stream to leave uncounted.")
    ] = 300,
    split: Annotated[
        str, typer.Option(help="Rows of this split, where the file has any; all: every row.")
    ] = "val",
    most_output: Annotated[
        int, typer.Option(min=1, max=2**20, help="No request reserves more output tokens.")
    ] = 32_768,
    model: Annotated[
        str | None, typer.Option("--model", help="A model directory. none: the live histograms.")
    ] = None,
    text: Annotated[bool, typer.Option(help="Tell the model the prompts.")] = True,
    as_json: AsJson = False,
) -> None:
    """Serve files one after the other as a drifting stream, with the history as it runs.

    Reserved: output tokens of the corrected prediction at the target. Recovery: requests of a
    phase until the next 100 are covered to 0.93.
    """
    kinds = [_rows_of(name, split) for name in file]
    chosen = None if model == "none" else Predictor.load(Path(model) if model else default_model())
    runs = []
    with tempfile.TemporaryDirectory(prefix="odma-stream-") as directory:
        for mean in _numbers(delay):
            phases = [
                list(
                    _phases(
                        [_shuffled(name, each, rows, seed, text=text) for name, each in kinds],
                        mean,
                        chosen,
                        Path(directory),
                        target,
                        most_output,
                        warmup,
                    )
                )
                for seed in range(seeds)
            ]
            runs.append(_run_object(mean, phases))
    facts = {
        "model": chosen.version if chosen else "",
        "target": target,
        "seeds": seeds,
        "warmup_requests": warmup,
        "most_output_tokens": most_output,
        "recovered": f"{RECOVERED} of the next {AHEAD}",
        "runs": runs,
    }
    show(facts, as_json, _picture)


def _numbers(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= number <= 10_000 for number in found):
        raise InvalidError("delay", f"numbers from 0 to 10,000, not {text!r}")
    return found


def _rows_of(name: str, split: str) -> tuple[str, Rows]:
    """Return the rows of FILE or FILE:MODEL. Raises InvalidError if there are none."""
    path, _, model = name.partition(":") if not Path(name).exists() else (name, "", "")
    rows = read_rows(Path(path), None if split == "all" else split)
    if not len(rows):
        rows = read_rows(Path(path))
    if model:
        served = [i for i, each in enumerate(rows.models) if model in each]
        rows = rows.take(np.isin(rows.model, served))
    if not len(rows):
        raise InvalidError(name, "no rows" + (f" of a model called {model!r}" if model else ""))
    return Path(path).stem + (f":{model}" if model else ""), rows


def _shuffled(name: str, rows: Rows, most: int, seed: int, *, text: bool) -> Kind:
    chosen = rows.take(np.random.default_rng(seed).permutation(len(rows))[:most])
    prompts = [_cut(chosen.prompts[i]) for i in chosen.prompt]
    return Kind(
        name,
        prompts if text else [None] * len(prompts),
        chosen.prompt_tokens.tolist(),
        chosen.output_tokens.tolist(),
    )


def _cut(prompt: bytes) -> str:
    """Return a prompt as an engine may send it: of a long one, head and tail."""
    if len(prompt) > 2 * END_BYTES:
        prompt = prompt[:END_BYTES] + prompt[-END_BYTES:]
    return prompt.decode(errors="ignore")


def _phases(
    kinds: Sequence[Kind],
    delay: float,
    model: Predictor | None,
    directory: Path,
    target: float,
    most: int,
    warmup: int,
) -> Iterator[Phase]:
    served = serve_stream(kinds, delay, model, directory, target=target, most_output_tokens=most)
    for number, kind in enumerate(kinds):
        yield phase_of(served, number, kind.name, warmup)
    yield phase_of(served._replace(phases=served.phases * 0), 0, "all", warmup)


def _run_object(delay: float, by_seed: Sequence[Sequence[Phase]]) -> dict[str, Any]:
    """Return the means over seeds, and the worst seed where that says more."""
    objects = [_phase_object(phases) for phases in zip(*by_seed, strict=True)]
    return {"delay_requests": delay, "phases": objects[:-1], "all": objects[-1]}


def _phase_object(seeds: Sequence[Phase]) -> dict[str, Any]:
    def mean(values: Sequence[float]) -> float | None:
        found = sum(values) / len(values)
        return None if math.isnan(found) else round(found, 4)

    recoveries = [phase.recovery_requests for phase in seeds]
    return {
        "phase": seeds[0].name,
        "requests": seeds[0].requests,
        "coverage": mean([phase.coverage for phase in seeds]),
        "coverage_worst_seed": mean([min(phase.coverage for phase in seeds)]),
        "reserved_over_actual": mean([phase.reserved_over_actual for phase in seeds]),
        "first_100_coverage": mean([phase.first_coverage for phase in seeds]),
        "recovery_requests": None if None in recoveries else mean([r or 0 for r in recoveries]),
        "window_share": mean([phase.window_share for phase in seeds]),
    }


def _picture(facts: dict[str, Any]) -> RenderableType:
    parts: list[RenderableType] = [f"model {facts['model'] or 'none'}, {facts['seeds']} seeds"]
    for run in facts["runs"]:
        table = Table(title=f"answers after {run['delay_requests']:g} requests")
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == "phase" else "right")
        for row in (*run["phases"], run["all"]):
            recovery = row["recovery_requests"]
            table.add_row(
                row["phase"],
                f"{row['requests']:,}",
                *(
                    "-" if row[name] is None else format(row[name], form)
                    for name, form in FIGURES.items()
                ),
                "never" if recovery is None else f"{recovery:.0f}",
            )
        parts.append(table)
    return Group(*parts)
