"""`odma predictor`: train, score and look at the models that predict output lengths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from odma_service.cli.failures import BadResultError
from odma_service.cli.lazy import lazily
from odma_service.cli.options import AsJson
from odma_service.cli.output import Facts, show
from odma_service.errors import InvalidError, OdmaError
from odma_service.learning.predictor import Predictor, default_model

if TYPE_CHECKING:
    from predictor_onnx.tuning import Comparison

app = typer.Typer(
    cls=lazily({"stream": "lab.stream.command"}),
    no_args_is_help=True,
    help="Train, score and look at length predictors.",
)

Model = Annotated[
    Path | None, typer.Option("--model", help="A model directory. Default: the shipped model.")
]


@app.command()
def card(model: Model = None) -> None:
    """Print a model's card: date, data, licences, figures."""
    file = (model or default_model()) / "card.md"
    try:
        typer.echo(file.read_text())
    except OSError as error:
        raise InvalidError("model", f"cannot read {file}: {error.strerror}") from None


@app.command()
def evaluate(
    files: Annotated[
        list[Path],
        typer.Argument(help="Parquet: prompt, prompt_tokens, output_tokens, model; one set each."),
    ],
    model: Model = None,
    history: Annotated[
        Path | None,
        typer.Option(help="Folder of such files whose training rows are the history."),
    ] = None,
    delay: Annotated[int, typer.Option(min=0, help="Rows until a completion is known.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Shuffles to average over.")] = 3,
    every_row: Annotated[
        bool, typer.Option("--every-row", help="Score the rows marked for training, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score a model beside the quantiles of past lengths alone."""
    from predictor_onnx.evaluate import evaluate as scores

    report = scores(
        files,
        Predictor.load(model or default_model()),
        history=history,
        seeds=seeds,
        delay=delay,
        every_row=every_row,
        say=lambda name: _heard(f"{name} ..."),
    )
    show(report, as_json, _scores)


def _scores(report: Facts) -> Table:
    table = Table(
        "set",
        title=f"{report['model_version']}, history: {report['history']}",
        caption="Pinball loss of log lengths; reserved / actual at exactly 95 % coverage.",
        title_justify="left",
    )
    for heading in ("rows", "pinball", "window's", "gain", "R2", "coverage 95", "reserved"):
        table.add_column(heading, justify="right")
    macros = {key: report[key] for key in report if key.startswith("macro") and report[key]}
    for name, row in (*report["sets"].items(), *macros.items()):
        gain = 1 - row["pinball_log"] / row["baseline_pinball_log"]
        table.add_row(
            name,
            f"{row['rows']:,}" if "rows" in row else f"{row['sets']} sets",
            f"{row['pinball_log']:.4f}",
            f"{row['baseline_pinball_log']:.4f}",
            f"{gain:+.1%}",
            f"{row['r2_log']:.3f}",
            f"{row['coverage_95']:.3f}",
            f"{row['over_reservation_95']:.2f}",
        )
    return table


@app.command()
def train(
    files: Annotated[
        list[Path],
        typer.Argument(help="Parquet files as for `evaluate`, one set each, or decision logs."),
    ],
    out: Annotated[Path, typer.Option(help="Directory to write the model to.")],
    name: Annotated[str, typer.Option(help="First word of the model's version.")] = "own",
    seed: Annotated[int, typer.Option(min=0, help="The same rows and seed: the same model.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    licence: Annotated[
        str, typer.Option(help="Licences of these rows, for the card.")
    ] = "not stated",
    base: Annotated[
        Path | None,
        typer.Option(help="Model that learns on from logs. Default: the shipped model."),
    ] = None,
) -> None:
    """Train a model on the rows marked for training, or one that learns on from decision logs.

    The model is proved to predict as it was trained. One from logs is written only if it predicts
    their latest requests better than the model it learnt on from; if not, the exit code is 1.
    """
    try:
        from predictor_onnx.decisions import is_log
        from predictor_onnx.making import make
        from predictor_onnx.train import Recipe
        from predictor_onnx.tuning import Tuning, tune
    except ImportError as error:
        raise OdmaError(f"training needs {error.name}: pip install 'odma-service[train]'") from None
    logs = [is_log(file) for file in files]
    if any(logs):
        if not all(logs):
            raise InvalidError("files", "parquet files or decision logs, not both at once")
        tuning = Tuning() if steps is None else replace(Tuning(), steps=steps)
        compared, tuned = tune(files, base or default_model(), out, name, seed, tuning, _heard)
        typer.echo(_told(compared))
        if tuned is None:
            raise BadResultError("not better than chance: nothing is written")
        typer.echo(f"better: wrote {tuned.version} to {out}")
        return
    recipe = Recipe()
    if steps is not None:
        recipe = replace(recipe, steps=steps, fold_steps=max(1, steps // 3))
    served = make(files, out, name, seed, recipe, licence, _heard)
    typer.echo(f"wrote {served.version} to {out}")


def _heard(told: str) -> None:
    typer.echo(told, err=True)


def _told(compared: Comparison) -> str:
    return (
        f"pinball on the last {compared.rows:,} requests: {compared.before:.4f} before,"
        f" {compared.after:.4f} after, {compared.window:.4f} by the window alone;"
        f" gain at least {compared.surely:.4f} (97.5 %);"
        f" coverage of q95 {compared.coverage_95_before:.3f}, {compared.coverage_95_after:.3f}"
    )
