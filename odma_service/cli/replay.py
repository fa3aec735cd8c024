"""`odma replay`: what each policy would give on a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from odma_service import replay, traces
from odma_service.cli.geometry import text_of
from odma_service.cli.options import AsJson, MovesChoice, Tenants, TraceFormat, tenant_of
from odma_service.cli.output import Facts, SafeConsole, progress_bar, show
from odma_service.pool.geometry import Geometry
from odma_service.pool.models import from_model_config
from odma_service.replay.workplace import workplace
from odma_service.values import Moves

DEFAULT_POLICIES = "static,s3,odma,elastic,oracle,paged-16,paged-64,ideal-best"


app = typer.Typer()


@app.command()
def command(
    trace: Annotated[list[Path], typer.Argument(help=f"Traces: {', '.join(traces.FORMATS)}.")],
    policy: Annotated[
        str,
        typer.Option(
            help=f"Some of {', '.join(replay.NAMES)}, divided by commas. "
            f"Default: {DEFAULT_POLICIES.replace(',', ', ')}.",
            show_default=False,
        ),
    ] = DEFAULT_POLICIES,
    rows: Annotated[int | None, typer.Option(min=1, help="First rows of the file only.")] = None,
    skip: Annotated[int, typer.Option(min=0, help="Requests to leave out at the beginning.")] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Runs. Each but the first reorders the trace.")
    ] = 1,
    capacity_tokens: Annotated[
        int, typer.Option(min=1_024, max=2**26, help="Size of the pool.")
    ] = 111_000,
    max_output: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens of an answer. Default: the longest, at least 4,096."),
    ] = None,
    model_length: Annotated[
        int | None,
        typer.Option(min=2, help="Most tokens of a request. Default: enough for every answer."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="LPDDR device: mlu370-x4, mlu370-x8 or a file like theirs.")
    ] = "mlu370-x4",
    model: Annotated[
        Path | None,
        typer.Option(help="A config.json, whose KV is priced in place of the default model's."),
    ] = None,
    weights_gbytes: Annotated[
        float | None,
        typer.Option(min=1e-3, help="Weights that a token reads, of 2 bytes each. Default: 15.2."),
    ] = None,
    peak_tflops: Annotated[
        float, typer.Option(min=1e-3, help="Peak compute of the device; half of it is assumed.")
    ] = 96.0,
    batch_cap: Annotated[
        int, typer.Option(min=1, max=4_096, help="Most requests running at once.")
    ] = 256,
    rate: Annotated[
        float | None,
        typer.Option(
            min=1e-6, help="Open loop, with arrivals this many times as fast as recorded."
        ),
    ] = None,
    swap_gbytes: Annotated[
        float,
        typer.Option(
            min=0, help="Swap preempted requests at this many GB/s; 0: compute them again."
        ),
    ] = 0.0,
    predictor: Annotated[
        str | None,
        typer.Option(help="For every policy: live, history, model, exact or lognormal:SIGMA."),
    ] = None,
    tenant: Tenants = None,
    moves: Annotated[
        MovesChoice | None,
        typer.Option(help="What the engine lets ours move. Default: what each policy is for."),
    ] = None,
    granule_tokens: Annotated[
        int | None,
        typer.Option(min=64, max=512, help="What is reused by. Default: the trace's blocks."),
    ] = None,
    parameters: Annotated[
        Path | None, typer.Option(help="File of tuned parameters. Default: the shipped one.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Directory for report.html, JSON, CSV and plots.")
    ] = None,
    form: TraceFormat = None,
    as_json: AsJson = False,
) -> None:
    """Serve traces in simulated time under every policy, and compare what they give."""
    names = policies_of(policy)
    shares = tuple(map(tenant_of, tenant or ()))
    serving = replay.Serving(
        device,
        peak_flops_per_second=peak_tflops * 1e12,
        swap_bytes_per_second=swap_gbytes * 1e9,
    )
    if model is not None:
        serving = of_model(serving, model, from_model_config(text_of(str(model))).geometry)
    if weights_gbytes is not None:
        serving = of_weights(serving, weights_gbytes * 1e9)
    tuning = replay.read_tuning(parameters) if parameters else replay.read_tuning()
    compared = []
    with workplace() as directory:
        for path in trace:
            load = replay.marked(traces.read_trace(path, rows, form), skip)
            setting = replay.Setting(
                replay.limits_for(load, capacity_tokens, max_output, model_length),
                serving,
                batch_cap=batch_cap,
                closed=rate is None,
                rate=rate or 1.0,
                predictor=predictor,
                seeds=seeds,
                tenants=shares,
                moves=Moves[moves.name] if moves else None,
                granule_tokens=granule_tokens or 0,
            )
            with progress_bar(as_json) as progress:
                watch = following(progress, len(load))
                comparison = replay.compare(load, names, setting, tuning, directory, watch)
            compared.append(comparison)
            if not as_json:
                show_comparison(comparison)
    if report is not None:
        for line in (*replay.write_report(compared, report), f"wrote {report}"):
            typer.echo(line, err=as_json)
    if as_json:
        show(_object(compared), as_json)


def of_model(serving: replay.Serving, config: Path, geometry: Geometry) -> replay.Serving:
    """Return the prices of another model's KV."""
    return replace(
        serving,
        model=str(config),
        kv_bytes_per_token=geometry.bytes_per_token,
        planes=geometry.plane_count,
    )


def of_weights(serving: replay.Serving, weight_bytes: float) -> replay.Serving:
    """Return the prices of other weights, of 2 bytes and 2 operations a token each."""
    return replace(serving, weight_bytes=weight_bytes, flops_per_token=weight_bytes)


def policies_of(names: str) -> list[str]:
    """Return the policies that an option names. Raises InvalidError."""
    return [replay.check_name(name.strip()) for name in names.split(",")]


def following(progress: Progress, total: int) -> replay.Progress:
    """Return what shows, in a bar, how many requests each run has finished."""
    tasks: dict[str, TaskID] = {}

    def watch(policy: str, seed: int, finished: int) -> None:
        name = f"{policy}, seed {seed}"
        if name not in tasks:
            for task in tasks.values():
                progress.update(task, visible=False)
            tasks[name] = progress.add_task(name, total=total)
        progress.update(tasks[name], completed=finished)

    return watch


def _object(compared: Sequence[replay.Comparison]) -> Facts:
    objects = [replay.as_object(comparison) for comparison in compared]
    return objects[0] if len(objects) == 1 else {"traces": objects}


def show_comparison(comparison: replay.Comparison) -> None:
    """Print a comparison: the class of the load first, then the policies side by side."""
    facts = replay.as_object(comparison)
    console = SafeConsole()
    ratio = facts["unlimited_over_ideal_paging"]
    console.print(Text(f"{facts['trace']}: {facts['load_class']}", style="bold"))
    lines = [
        f"an unlimited pool gives {ratio:.2f} x ideal paging on this one (memory-bound: 1.1)",
        f"{facts['requests']:,} requests, {facts['dropped']:,} dropped for all: they cannot fit",
        _sizes(facts),
        _assumed(facts["assumptions"]),
        f"parameters {facts['parameter_hash']}, {_windows(facts['windows'])}",
        *(f"note: {note}" for note in comparison.notes),
    ]
    if not comparison.load_class.memory_bound:
        lines.append("memory is not what this load is short of: its ratios prove little")
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    console.print(_table(facts))
    if any("tenants" in row for row in facts["policies"].values()):
        console.print(_tenant_table(facts))
    for line in replay.remarks(comparison):
        console.print(Text(line), soft_wrap=True)


def _sizes(facts: Facts) -> str:
    return (
        f"maximum = min(input + {facts['max_output_tokens']:,},"
        f" {facts['model_length_tokens']:,}) tokens, pool {facts['capacity_tokens']:,} tokens"
    )


def _assumed(assumed: Facts) -> str:
    return (
        f"{assumed['device']}, {assumed['model']}: "
        f"{assumed['peak_flops_per_second'] / 1e12:g} TFLOP/s x {assumed['compute_efficiency']:g}, "
        f"{assumed['bandwidth_bytes_per_second'] / 1e9:g} GB/s x "
        f"{assumed['sequential_bandwidth_share']:.3f} (copies x "
        f"{assumed['copy_bandwidth_share']:.3f}), emulated, pages at "
        + ", ".join(f"{k}: {v:g}" for k, v in assumed["paged_bandwidth_shares"].items())
        + f" of long runs ({assumed['pages_in_flight']} in flight); "
        f"batch cap {assumed['batch_cap']}, {assumed['loop']} loop,"
        f" {assumed['prefix_cache']}"
    )


def _windows(windows: Sequence[Facts]) -> str:
    first = windows[0]
    kind = "finished requests" if first["steady"] else "the whole run: too few requests,"
    return f"window: {kind} {first['first']:,} to {first['last']:,}"


def _table(facts: Facts) -> Table:
    table = Table()
    for heading, _ in replay.COLUMNS:
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for name, row in facts["policies"].items():
        table.add_row(*(cell(name, row) for _, cell in replay.COLUMNS))
    return table


def _tenant_table(facts: Facts) -> Table:
    table = Table("policy", "tenant")
    for heading in ("requests", "tokens/s", "TTFT p50/p99 s", "preempted"):
        table.add_column(heading, justify="right")
    for name, row in facts["policies"].items():
        for tenant, got in row["tenants"].items():
            table.add_row(
                name,
                Text(tenant),
                f"{got['requests']:,.0f}",
                f"{got['tokens_per_s']:,.1f}",
                f"{got['ttft_p50_s']:.2f} / {got['ttft_p99_s']:.1f}",
                f"{got['preemptions']:,.0f}",
            )
    return table
