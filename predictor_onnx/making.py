"""Making a model: read, train, export, score, and write down what came of it on its card."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from odma_service.errors import InvalidError
from odma_service.learning.predictor import RESEARCH, Predictor, PromptInput
from odma_service.values import Text
from predictor_onnx.evaluate import NON_COMMERCIAL, evaluate
from predictor_onnx.export import Proof, export
from predictor_onnx.rows import Rows, histories, read_rows, running
from predictor_onnx.train import Recipe, Say, train

PROVED = 1_000
WORTH_TRAINING = 200
NOT_FOR_BUSINESS = "**NON-COMMERCIAL.** For research alone: some of its data may not be used else."


def make(
    files: Sequence[Path],
    out: Path,
    name: str,
    seed: int,
    recipe: Recipe,
    licence: str,
    say: Say,
) -> Predictor:
    """Train on the rows marked for training (all rows, where none is marked) and export.

    Raises InvalidError for files that cannot be used, or may be only under a name that says
    so; OdmaError if the export differs.
    """
    restricted = [file.stem for file in files if file.stem in NON_COMMERCIAL]
    if restricted and not name.startswith(RESEARCH):
        raise InvalidError(
            "name", f"{', '.join(restricted)}: non-commercial; a name in {RESEARCH}... says so"
        )
    sets = [_training_rows(file) for file in files]
    trained = train(sets, seed, recipe, say)
    served, proof = export(trained, out, name, _examples(sets))
    kept_aside = [file for file in files if len(read_rows(file, without="train"))]
    report = evaluate(kept_aside, served, say=say) if kept_aside else None
    facts = {"seed": seed, "recipe": asdict(recipe)}
    (out / "card.md").write_text(_card(served.version, sets, licence, facts, proof, report))
    return Predictor.load(out)


def _training_rows(file: Path) -> Rows:
    rows = read_rows(file, split="train")
    if len(rows) < WORTH_TRAINING:
        raise InvalidError(str(file), f"{len(rows)} rows for training, {WORTH_TRAINING} at least")
    return rows


def _examples(sets: Sequence[Rows]) -> list[PromptInput]:
    """Return prompts to prove an export on: of all sets, with running histories."""
    chosen = []
    for rows in sets:
        some, table = running(rows.take(np.arange(min(len(rows), 20_000))), 64, 0)
        few = np.linspace(0, len(some) - 1, PROVED // len(sets)).astype(int)
        for row, history in zip(few, histories(table[few]), strict=True):
            text = some.prompts[some.prompt[row]]
            chosen.append(PromptInput(Text(text), int(some.prompt_tokens[row]), history))
    return chosen


def _card(
    version: str,
    sets: Sequence[Rows],
    licence: str,
    facts: dict[str, Any],
    proof: Proof,
    report: dict[str, Any] | None,
) -> str:
    lines = [
        f"# {version}",
        "",
        f"Made on {dt.datetime.now(dt.UTC).date().isoformat()}. Predicts how many tokens an",
        "answer will have, from the prompt and the last lengths of the same model, as quantiles.",
        "",
        *([NOT_FOR_BUSINESS, ""] if version.startswith(RESEARCH) else []),
        f"**Licences of the data.** {licence}",
        "",
        "## Data",
        "",
        "| set | rows | prompts | models |",
        "| --- | --- | --- | --- |",
        *(_set_line(rows) for rows in sets),
        "",
        "Rows with hidden reasoning left out. Figures below are of rows that are in no training.",
        "",
        "## Training and export",
        "",
        f"Seed {facts['seed']}; "
        + ", ".join(f"{key} {value}" for key, value in facts["recipe"].items())
        + ".",
        "",
        _proof_line(proof),
        "",
        *(_figures(report) if report else ["## Figures", "", "Not measured: no rows kept aside."]),
    ]
    return "\n".join(lines) + "\n"


def _proof_line(proof: Proof) -> str:
    return (
        f"Over {proof.prompts} prompts, in log lengths: ONNX differs from the training framework"
        f" by {proof.onnx_from_training:.1g} at most, the service by"
        f" {proof.service_from_training:.1g}; int8 from float32 by"
        f" {proof.int8_from_float_mean:.4f} on average, {proof.int8_from_float_most:.3f} at most."
    )


def _set_line(rows: Rows) -> str:
    prompts, models = len(np.unique(rows.prompt)), len(np.unique(rows.model))
    return f"| {rows.name} | {len(rows):,} | {prompts:,} | {models} |"


def _figures(report: dict[str, Any]) -> Iterator[str]:
    yield "## Figures"
    yield ""
    yield (
        f"History: {report['history']}, {report['delay_rows']} rows late, {report['seeds']}"
        " shuffles. Pinball loss of log lengths, the window's quantiles alone beside it;"
        " reserved / actual tokens at exactly 95 % coverage."
    )
    yield ""
    yield "| set | rows | pinball | window alone | R2 | coverage of q95 | reserved / actual |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, row in (*report["sets"].items(), ("macro", report["macro"])):
        rows = f"{row['rows']:,}" if "rows" in row else ""
        yield (
            f"| {name} | {rows} | {row['pinball_log']:.4f} | {row['baseline_pinball_log']:.4f}"
            f" | {row['r2_log']:.2f} | {row['coverage_95']:.3f}"
            f" | {row['over_reservation_95']:.2f} |"
        )
