"""`odma demo`: a real server, an engine that plays against it, and what came of it.

It exits with 1 when a token was not where it should be, when a request or a token is
missing, when the books do not balance, and when the usual synthetic load, which is made to be
short of memory, was not. A trace or an option that cannot be used, or a trace of which nothing
fits, exits with 2.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.progress import (
    Progress,
    TaskID,
)
from rich.text import Text

from odma_service.cli.failures import BadResultError, bad_result
from odma_service.cli.options import AsJson, Ca, Cert, Connection, Key, MovesChoice, TraceFormat
from odma_service.cli.output import progress_bar, show
from odma_service.client import Client
from odma_service.client.local import own_server
from odma_service.demo.play import Setting, play
from odma_service.demo.report import Outcome, as_object, table_of
from odma_service.errors import InvalidError, OdmaError
from odma_service.replay.load import Limits, load_of
from odma_service.replay.loop import History
from odma_service.replay.pooled import EngineKind
from odma_service.traces import Trace, generate, read_trace
from odma_service.values import Moves

POLICIES = ("static", "s3", "odma", "elastic")
SYNTHETIC_ROWS = 1_000
BAR_DECISIONS = 64  # the progress bar moves once in so many

USUAL = Setting()
USUAL_SIZE = USUAL.limits, USUAL.batch_cap


class StreamsChoice(StrEnum):
    """On how many streams the engine runs copies and kernels."""

    SINGLE = "single"
    SEVERAL = "several"


app = typer.Typer()


@app.command()
def command(
    trace: Annotated[
        Path | None,
        typer.Option(help="As for `odma trace describe`. Without it: a synthetic load."),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help=f"Requests to play. Default: all; synthetic {SYNTHETIC_ROWS}."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the synthetic load.")] = 1,
    policy: Annotated[
        str, typer.Option(help=f"One or more of {', '.join(POLICIES)}, divided by commas.")
    ] = "static,odma,elastic",
    target: Annotated[
        str | None, typer.Option(help="HOST:PORT of a server. Without it: one of its own.")
    ] = None,
    capacity_tokens: Annotated[
        int, typer.Option(min=1_024, max=2**24, help="Size of the pool.")
    ] = USUAL.limits.capacity_tokens,
    max_output: Annotated[
        int, typer.Option(min=1, max=2**24, help="Most tokens of an answer.")
    ] = USUAL.limits.max_output_tokens,
    model_length: Annotated[
        int, typer.Option(min=2, max=2**24, help="Most tokens of prompt and answer together.")
    ] = USUAL.limits.model_length_tokens,
    batch_cap: Annotated[
        int, typer.Option(min=1, max=1_024, help="Most requests running at once.")
    ] = USUAL.batch_cap,
    moves: Annotated[
        MovesChoice, typer.Option(help="What the engine lets the service move.")
    ] = MovesChoice.ANY,
    streams: Annotated[
        StreamsChoice, typer.Option(help="With several, completions are known a step late.")
    ] = StreamsChoice.SINGLE,
    overlap: Annotated[
        bool, typer.Option(help="The engine's copies have the meaning of memmove.")
    ] = True,
    overtake: Annotated[
        int,
        typer.Option(min=0, max=256, help="Requests that may pass one that waits. 0: none."),
    ] = USUAL.overtake,
    granule_tokens: Annotated[
        int,
        typer.Option(min=0, max=512, help="What a trace with hash_ids reuses by. 0: nothing."),
    ] = 0,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    drop_copy: Annotated[int, typer.Option(min=0, hidden=True)] = 0,
    form: TraceFormat = None,
    as_json: AsJson = False,
) -> None:
    """Play an engine against a real server, over gRPC, and check every token it keeps."""
    single = streams is StreamsChoice.SINGLE
    kind = EngineKind(Moves[moves.name], single, overlap, granule_tokens)
    limits = Limits(max_output, model_length, capacity_tokens)
    setting = Setting(limits, kind, batch_cap, overtake, drop_copy)
    policies = _policies(policy)
    load = _load(trace, rows, seed, limits, form)
    load_of(load, limits)  # one of which nothing fits needs no server to be refused
    server = own_server() if target is None else nullcontext(target)
    with (
        bad_result(OdmaError),
        server as address,
        Connection(address, ca, cert, key).client(retry_seconds=30) as service,
    ):
        outcomes = _play(load, policies, setting, service, quiet=as_json)
    show(as_object(outcomes), as_json, lambda _: _picture(load, limits, outcomes))
    made_short = trace is None and rows is None and (limits, batch_cap) == USUAL_SIZE
    strict = made_short and kind.moves is Moves.ANY and kind.single_stream
    flaws = [flaw for outcome in outcomes for flaw in outcome.flaws()]
    flaws += [
        omission
        for outcome in outcomes
        if strict and outcome.policy == "elastic"
        for omission in outcome.omissions()
    ]
    if flaws:
        raise BadResultError(*flaws)


def _policies(names: str) -> list[str]:
    policies = [name.strip() for name in names.split(",")]
    for name in policies:
        if name not in POLICIES:
            raise InvalidError("policy", f"some of {', '.join(POLICIES)}, not {name!r}")
    return list(dict.fromkeys(policies))


def _load(
    path: Path | None, rows: int | None, seed: int, limits: Limits, form: str | None
) -> Trace:
    """Return the trace to play; a made one is cut by the engine, not by its maker."""
    if path is not None:
        return read_trace(path, rows, form)
    return generate(rows or SYNTHETIC_ROWS, seed, max_output_tokens=limits.model_length_tokens)


def _play(
    load: Trace, policies: list[str], setting: Setting, service: Client, *, quiet: bool
) -> list[Outcome]:
    with progress_bar(quiet) as progress:
        outcomes = []
        for policy in policies:
            task = progress.add_task(policy, total=len(load))
            outcomes.append(play(service, load, policy, setting, _mover(progress, task)))
            progress.update(task, completed=len(load))
    return outcomes


def _mover(progress: Progress, task: TaskID) -> Callable[[History], None]:
    def watch(history: History) -> None:
        if history.decisions % BAR_DECISIONS == 0:
            progress.update(task, completed=len(history.finished))

    return watch


def _picture(load: Trace, limits: Limits, outcomes: list[Outcome]) -> RenderableType:
    title = f"{load.label}: {len(load):,} requests, {limits.capacity_tokens:,} tokens of memory"
    notes = (Text(f"note: {note}") for note in load.notes)
    return Group(*notes, table_of(outcomes, title))
