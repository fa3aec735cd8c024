"""Evaluation: how good a served model is on rows of parquet files, beside its window alone.

The baseline is what anybody has without a model: the running quantiles of the very window
that the model is given. Where there is no window yet, both are as wide as the training rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from odma_service.errors import InvalidError
from odma_service.learning.predictor import Predictor, PromptInput
from odma_service.learning.survival import LEVELS
from odma_service.values import Text
from predictor_onnx.rows import Floats, Rows, histories, read_rows, resting, running

DELAY = 64
BATCH = 64
SLACK = 1e-4
"""A log length that is this much below the actual one covers it: rounding."""

NON_COMMERCIAL = ("alpaca_eval", "alpaca_filtered", "alpaca_random9k", "code_alpaca")
AVERAGED = (
    "pinball_log",
    "baseline_pinball_log",
    "r2_log",
    "coverage_95",
    "over_reservation_95",
    "baseline_over_reservation_95",
)

Doubles = NDArray[np.float64]


def pinball(logs: Doubles, actual: Doubles) -> float:
    """Return the mean pinball loss of rows of quantiles at LEVELS."""
    missed = actual[:, None] - logs
    return float(np.maximum(LEVELS * missed, (LEVELS - 1) * missed).mean())


def over_reservation(upper: Doubles, actual: Doubles) -> float:
    """Return reserved / actual tokens once `upper` is shifted until it covers 95 % exactly.

    `upper` and `actual` are log lengths; the one shift is what an ideal calibration would do.
    """
    shift = np.quantile(actual - upper, 0.95, method="higher")
    return float(np.expm1(np.maximum(upper + shift, 0)).sum() / np.expm1(actual).sum())


def predictions(predictor: Predictor, rows: Rows, table: Floats) -> Doubles:
    """Return rows of seven log lengths, as the service would answer them."""
    prompts = [
        PromptInput(Text(rows.prompts[prompt]), int(tokens), history)
        for prompt, tokens, history in zip(
            rows.prompt, rows.prompt_tokens, histories(table), strict=True
        )
    ]
    parts = [predictor.predict(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
    logs: Doubles = np.log1p(np.array([row for part in parts for row in part]))
    return logs


def score(logs: Doubles, window: Doubles, actual: Doubles) -> dict[str, float]:
    """Return the figures of one set: of predictions, and of their windows alone."""
    spread = float(((actual - actual.mean()) ** 2).sum())
    return {
        "pinball_log": pinball(logs, actual),
        "baseline_pinball_log": pinball(window, actual),
        "r2_log": 1 - float(((actual - logs[:, 2]) ** 2).sum()) / max(spread, 1e-12),
        "coverage_95": float((logs[:, 5] >= actual - SLACK).mean()),
        "over_reservation_95": over_reservation(logs[:, 5], actual),
        "baseline_over_reservation_95": over_reservation(window[:, 5], actual),
    }


def evaluate(
    files: Sequence[Path],
    predictor: Predictor,
    *,
    history: Path | None = None,
    seeds: int = 3,
    delay: int = DELAY,
    every_row: bool = False,
    say: Callable[[str], None] = lambda told: None,
) -> dict[str, Any]:
    """Score files, each shuffled `seeds` times, and average over sets.

    Rows that are marked for training are left out unless `every_row`. `history`: a folder with
    files of the same names, of whose training rows a history is made in place of a running one.
    Raises InvalidError.
    """
    wide = np.log1p(predictor.wide)
    sets: dict[str, Any] = {}
    generated: list[str] = []
    for file in files:
        say(file.stem)
        rows = read_rows(file, without=None if every_row else "train")
        if not len(rows):
            raise InvalidError(str(file), "no rows but those for training")
        past = read_rows(history / file.name, split="train") if history else None
        scores, cold = [], 0
        for seed in range(seeds):
            if past is None:
                shuffled, table = running(rows, delay, seed)
            else:
                shuffled, table = rows, resting(rows, past)
            told = table[:, -1:] > 0
            window = np.where(told, table[:, 2:9], wide).astype(np.float64)
            logs = predictions(predictor, shuffled, table)
            scores.append(score(logs, window, shuffled.logs.astype(np.float64)))
            cold = int((~told).sum())
            if past is not None:
                break
        sets[rows.name] = {
            "rows": len(rows),
            "cold_rows": cold,
            **{name: round(float(np.mean([one[name] for one in scores])), 5) for name in AVERAGED},
            "pinball_log_by_seed": [round(one["pinball_log"], 5) for one in scores],
        }
        if {rows.models[model] for model in np.unique(rows.model)} != {"human"}:
            generated.append(rows.name)
    return {
        "model_version": predictor.version,
        "history": "training rows of the same set and model" if history else "running",
        "delay_rows": None if history else delay,
        "seeds": 1 if history else seeds,
        "sets": sets,
        "macro": _macro(sets, list(sets)),
        "macro_generated": _macro(sets, generated),
        "macro_without_non_commercial": _macro(
            sets, [name for name in sets if name not in NON_COMMERCIAL]
        ),
    }


def _macro(sets: dict[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    """Return plain means over sets, and the worst of them; None of no sets."""
    if not names:
        return None
    means: dict[str, Any] = {
        name: round(float(np.mean([sets[of][name] for of in names])), 5) for name in AVERAGED
    }
    gains = {of: 1 - sets[of]["pinball_log"] / sets[of]["baseline_pinball_log"] for of in names}
    worst = min(gains, key=lambda of: gains[of])
    return {
        "sets": len(names),
        **means,
        "gain": round(1 - means["pinball_log"] / means["baseline_pinball_log"], 4),
        "worst_gain": round(gains[worst], 4),
        "worst_gain_set": worst,
        "worst_coverage_95": min(sets[of]["coverage_95"] for of in names),
    }
