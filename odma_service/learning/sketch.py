"""Sketch: the features of a prompt, as short as a decision log may carry them.

Mean embeddings of words, pairs and pieces, shares of them that are known, and the counts, one
signed byte each, in base64 behind the name of the embeddings. Anybody who has the model can
check a guess of the prompt against it, and piece a short prompt together: docs/guides/security.md.
Counts are kept as 127 steps of their square roots, so a number in the prompt that is above 8 is
known to a tenth of itself at best, and to a fifth if it is large.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import TYPE_CHECKING

import numpy as np

from odma_service._native.features import GROUPS, STATS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

MOST_STAT = 33.0
"""A little above the greatest statistic, 32 bytes a token."""


def sketched(row: Floats, scales: Floats, name: str) -> str:
    """Return the sketch of a row of features, as Embeddings.embed writes it.

    name: the embeddings'.
    scales: the size of one step in each dimension of the embeddings, (dims,).
    """
    means, rest = np.split(row, [GROUPS * len(scales)])
    known, stats = np.split(rest, [GROUPS])
    steps = (
        means / np.tile(scales, GROUPS),
        known * 127,
        np.sqrt(np.clip(stats, 0, MOST_STAT) / MOST_STAT) * 127,
    )
    whole = np.clip(np.rint(np.concatenate(steps)), -127, 127).astype(np.int8)
    return f"{name}:{b64encode(whole.tobytes()).decode()}"


def features_of(sketch: str, scales: Floats, name: str) -> Floats | None:
    """Return the row of features that a sketch stands for, None if it is not of these embeddings.

    A broken sketch of theirs is None too.
    """
    of, _, coded = sketch.partition(":")
    try:
        whole = np.frombuffer(b64decode(coded, validate=True), np.int8).astype(np.float32)
    except ValueError:
        return None
    if of != name or len(whole) != GROUPS * (len(scales) + 1) + STATS:
        return None
    means, rest = np.split(whole, [GROUPS * len(scales)])
    known, stats = np.split(rest, [GROUPS])
    parts = (means * np.tile(scales, GROUPS), known / 127, (stats / 127) ** 2 * MOST_STAT)
    return np.concatenate(parts).astype(np.float32)
