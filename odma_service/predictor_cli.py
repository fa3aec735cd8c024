"""`odma predictor`: train, score and look at the models that predict output lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from odma_service.errors import InvalidError
from odma_service.learning.predictor import default_model
from odma_service.stream_cli import stream_command

app = typer.Typer(no_args_is_help=True, help="Train, score and look at length predictors.")

app.command("stream")(stream_command)

Model = Annotated[Path | None, typer.Option("--model", help="A model directory, not our own.")]


@app.command()
def card(model: Model = None) -> None:
    """Print a model's card: date, data, licences, figures."""
    file = (model or default_model()) / "card.md"
    try:
        typer.echo(file.read_text())
    except OSError as error:
        raise InvalidError("model", f"cannot read {file}: {error.strerror}") from None


@app.callback()
def _group() -> None:
    """Keep the name of the only command."""
