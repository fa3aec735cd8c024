"""What a deployment's own decision logs teach: lengths, histories as they were, sketches.

There are no texts in them. A record with a sketch is as good as one with a text, for a model with
the same embeddings; others teach what counts and histories can.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from odma_service._native import LEARNT_ENOUGH
from odma_service._native.features import STATS
from odma_service.errors import InvalidError
from odma_service.learning.predictor import WINDOW, Predictor
from predictor_onnx.rows import Floats, Integers, summarise

START = b'{"odma":'
VERSION = 1
MOST_ROWS = 200_000
"""The latest records are used: each takes a kilobyte here."""

Doubles = NDArray[np.float64]


class Seen(NamedTuple):
    """Requests in the order in which they were asked for. n rows.

    features    (n, width) as Embeddings.embed writes them; without text, the count of tokens only
    text        (n,) 1 where there is a sketch
    windows     (n, WINDOW) log lengths of the completions known then, oldest first
    counts      (n,) how many of them count
    logs        (n,) log(1 + output tokens); at least that, where it is the limit
    limits      (n,) log(1 + most output tokens), infinite where none is known
    """

    asked: Doubles
    ended: Doubles
    features: Floats
    text: Floats
    windows: Floats
    counts: Integers
    logs: Floats
    limits: Floats

    def __len__(self) -> int:
        return len(self.asked)

    def take(self, chosen: NDArray[Any]) -> Seen:
        """Return some of the rows, by a mask or by their numbers."""
        return Seen(*(column[chosen] for column in self))

    @property
    def history(self) -> Floats:
        """Rows of histories, as History has them."""
        return summarise(self.windows, self.counts)


class _Record(NamedTuple):
    kind: tuple[str, str]  # pool and class
    ended: float
    asked: float | None  # None: it teaches histories only
    prompt_tokens: int
    output_tokens: int
    limit_tokens: float
    sketch: str | None


def is_log(file: Path) -> bool:
    """Whether a file begins as a decision log does. Raises InvalidError if it cannot be read."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(START)) == START
    except OSError as error:
        raise InvalidError(str(file), f"cannot be read: {error.strerror}") from None


def read_logs(files: Sequence[Path], model: Predictor) -> tuple[Seen, dict[str, int]]:
    """Read what a model can learn from logs, and count what is in them.

    An answer that was stopped at its limit is known to be at least so long. What was aborted or
    lost teaches nothing. A request that was preempted before its first record, or asked for
    before a restart, is part of later histories only. Raises InvalidError.
    """
    records: dict[tuple[Any, ...], _Record] = {}
    lines = unended = 0
    for file in files:
        for row, line in enumerate(_lines(file), 1):
            lines += 1
            try:
                name, record = _record(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError) as problem:
                raise InvalidError(f"{file}: row {row}", f"no record: {problem!r}") from None
            if record is None:
                unended += 1
            else:
                records[name] = record  # rotated files may overlap
    completions = sorted(records.values(), key=lambda record: record.ended)
    asked = [record for record in completions if record.asked is not None]
    asked = sorted(asked, key=lambda record: record.asked or 0.0)[-MOST_ROWS:]
    seen = _seen(asked, completions, model)
    return seen, {
        "records": lines,
        "used": len(seen),
        "sketched": int(seen.text.sum()),
        "at_their_limit": int((seen.logs >= seen.limits).sum()),
        "not_ended": unended,
        "for_histories_only": len(completions) - len(seen),
    }


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as opened:
            yield from filter(bytes.strip, opened)
    except OSError as error:
        raise InvalidError(str(file), f"cannot be read: {error.strerror}") from None


def _record(said: dict[str, Any]) -> tuple[tuple[Any, ...], _Record | None]:
    """Return a record under a name that no other has; None for one that did not end by itself."""
    if (said["odma"], said["version"]) != ("request", VERSION):
        raise ValueError(f"version {said['version']!r}, not {VERSION}")
    pool, ended = str(said["pool"]), float(said["ended"])
    name = (pool, said["epoch"], said["request_id"], ended)
    if said["end"] not in {"FINISHED", "HIT_LIMIT"}:
        return name, None
    prompt, output, most = said["prompt_tokens"], said["output_tokens"], said["max_total_tokens"]
    limit = max(most - prompt, output) if most is not None else np.inf
    whole = said["asked"] is not None and said["generated_before_tokens"] == 0
    return name, _Record(
        (pool, str(said["request_class"])),
        ended,
        float(said["asked"]) if whole else None,
        int(prompt),
        int(output),
        float(output if said["end"] == "HIT_LIMIT" else limit),
        said.get("sketch"),
    )


def _seen(asked: Sequence[_Record], completions: Sequence[_Record], model: Predictor) -> Seen:
    """Return requests with what had completed of their class, or of their pool, by then."""
    done: dict[Any, tuple[list[float], list[int]]] = {}
    for record in completions:
        for scope in (record.kind, record.kind[0]):
            times, lengths = done.setdefault(scope, ([], []))
            times.append(record.ended)
            lengths.append(record.output_tokens)
    past = {scope: (np.array(t), np.log1p(n)) for scope, (t, n) in done.items()}
    n = len(asked)
    windows, counts = np.zeros((n, WINDOW), np.float32), np.zeros(n, np.int64)
    features, text = np.zeros((n, model.width), np.float32), np.zeros(n, np.float32)
    for i, record in enumerate(asked):
        at = record.asked or 0.0
        ends, logs = past[record.kind]
        end = int(np.searchsorted(ends, at))
        if end < LEARNT_ENOUGH:
            ends, logs = past[record.kind[0]]
            end = int(np.searchsorted(ends, at))
        counts[i] = min(end, WINDOW)
        windows[i, : counts[i]] = logs[end - counts[i] : end]
        row = model.seen(record.sketch) if record.sketch else None
        if row is not None:
            features[i], text[i] = row, 1
        features[i, -STATS] = np.log1p(record.prompt_tokens)
    outputs = np.array([record.output_tokens for record in asked], np.float64)
    limits = np.array([record.limit_tokens for record in asked], np.float64)
    return Seen(
        np.array([record.asked for record in asked], np.float64),
        np.array([record.ended for record in asked], np.float64),
        features,
        text,
        windows,
        counts,
        np.log1p(outputs).astype(np.float32),
        np.log1p(limits).astype(np.float32),
    )
