"""Prompts and the lengths of their answers, from parquet files, and histories as they run.

A file has the columns prompt, prompt_tokens, output_tokens, model and, if it likes,
reasoning_hidden, split and meta (a task). Rows with hidden reasoning are left out: their length
is not what was generated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from odma_service.errors import InvalidError, OdmaError
from odma_service.learning.predictor import WINDOW, History
from odma_service.learning.survival import LEVELS, summaries

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

COLUMNS = ("prompt", "prompt_tokens", "output_tokens", "model")


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one set. `prompt`, `model` and `task` number what is in the tuples of that name."""

    name: str
    prompts: tuple[bytes, ...]
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    prompt: Integers
    model: Integers
    task: Integers
    prompt_tokens: Integers
    output_tokens: Integers

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def logs(self) -> Floats:
        """log(1 + output tokens)."""
        return np.log1p(self.output_tokens).astype(np.float32)

    def take(self, chosen: NDArray[Any]) -> Rows:
        """Return some of the rows, by a mask or by their numbers."""
        columns = (self.prompt, self.model, self.task, self.prompt_tokens, self.output_tokens)
        names = (self.name, self.prompts, self.models, self.tasks)
        return Rows(*names, *(column[chosen] for column in columns))


def read_rows(file: Path, split: str | None = None, without: str | None = None) -> Rows:
    """Read a file: all rows, those of one split, or those without one.

    Raises InvalidError that names the file and what it lacks.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise OdmaError("parquet needs pyarrow: pip install 'odma-service[trace]'") from None
    try:
        table = pq.read_table(file)
    except FileNotFoundError:
        raise InvalidError(str(file), "no such file") from None
    except (OSError, ValueError) as problem:
        raise InvalidError(str(file), f"not a parquet file: {problem}") from None
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise InvalidError(str(file), f"no column {', '.join(missing)}")
    keep = np.ones(table.num_rows, bool)
    if "reasoning_hidden" in table.column_names:
        keep &= ~np.array(table["reasoning_hidden"].fill_null(False))
    if "split" in table.column_names and (split or without):
        splits = np.array(table["split"].to_pylist(), object)
        keep &= splits == split if split else splits != without
    table = table.filter(keep)
    prompts, prompt = _numbered(table["prompt"])
    models, model = _numbered(table["model"])
    lengths = [np.array(table[name], np.int64) for name in ("prompt_tokens", "output_tokens")]
    texts = tuple((text or "").encode(errors="surrogatepass") for text in prompts)
    tasks, task = [""], np.zeros(len(prompt), np.int64)
    if "meta" in table.column_names:
        tasks, task = _numbered(table["meta"])
    names = (file.stem, texts, tuple(map(str, models)), tuple(map(str, tasks)))
    return Rows(*names, prompt, model, task, *lengths)


def _numbered(column: Any) -> tuple[list[Any], Integers]:
    values = column.to_pylist()
    places = {value: i for i, value in enumerate(dict.fromkeys(values))}
    return list(places), np.array([places[value] for value in values], np.int64)


def summarise(windows: Floats, counts: Integers) -> Floats:
    """Return the histories of many windows at once: rows of mean, sd, quantiles, count.

    `windows` are rows of log lengths of which the first `counts` count.
    """
    counts, places = counts[:, None], np.arange(windows.shape[1])
    ascending = np.sort(np.where(places < counts, windows, 0).astype(np.float64), axis=1)
    counted = places >= windows.shape[1] - counts  # no log length is below 0
    weights = counted / np.maximum(counts, 1)
    return np.hstack([summaries(ascending, weights), counts]).astype(np.float32)


def running(rows: Rows, delay: int, seed: int) -> tuple[Rows, Floats]:
    """Return rows in a seeded shuffle, and for each what had been seen of its model by then.

    Row i has completed when row i + delay is asked, and not before.
    """
    rows = rows.take(np.random.default_rng((seed, 64)).permutation(len(rows)))
    logs, windows = rows.logs, np.zeros((len(rows), WINDOW), np.float32)
    counts = np.zeros(len(rows), np.int64)
    for model in np.unique(rows.model):
        [own] = np.nonzero(rows.model == model)
        done = np.searchsorted(own, own - delay, "right") if delay else np.arange(len(own))
        for i, end in zip(own, done, strict=True):
            start = max(0, end - WINDOW)
            counts[i] = end - start
            windows[i, : end - start] = logs[own[start:end]]
    return rows, summarise(windows, counts)


def resting(rows: Rows, past: Rows) -> Floats:
    """Return for each row what all rows of `past` with the same model say together."""
    known = dict(zip(past.models, range(len(past.models)), strict=True))
    table = np.zeros((len(rows.models), 3 + len(LEVELS)), np.float32)
    for number, model in enumerate(rows.models):
        own = past.logs[past.model == known.get(model, -1)].astype(np.float64)
        if len(own):
            middle = np.quantile(own, LEVELS)
            table[number] = [own.mean(), own.std(), *middle, min(len(own), WINDOW)]
    return table[rows.model]


def histories(table: Floats) -> list[History]:
    """Return rows of histories as the service has them."""
    made = []
    for mean, sd, a, b, c, d, e, f, g, count in table.astype(np.float64).tolist():
        made.append(History(mean, sd, (a, b, c, d, e, f, g), int(count)))
    return made
