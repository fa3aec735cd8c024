"""What a length predictor sees of a prompt: ids and statistics, or pooled embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from odma_service._native._odma import ffi, lib
from odma_service.errors import InvalidError

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERSION: int = lib.ODMA_FEATURES_VERSION
BUCKETS: int = lib.ODMA_FEATURES_BUCKETS
GROUPS: int = lib.ODMA_FEATURES_GROUPS
STATS: int = lib.ODMA_FEATURES_STATS
HEAD: int = lib.ODMA_FEATURES_HEAD
TAIL: int = lib.ODMA_FEATURES_TAIL
NO_ROW: int = lib.ODMA_FEATURES_NO_ROW
MOST_TOKENS = 2**32 - 1


class Seen(NamedTuple):
    """A prompt as ids, one array a group, and as statistics."""

    ids: tuple[NDArray[np.uint16], ...]
    stats: NDArray[np.float32]


def see(text: bytes, prompt_tokens: int) -> Seen:
    """Return what is seen of a prompt. Any bytes will do."""
    features = _seen(text, prompt_tokens)
    ends = np.cumsum(list(features.counts))
    flat = np.frombuffer(ffi.buffer(features.ids), np.uint16)[: ends[-1]].copy()
    stats = np.frombuffer(ffi.buffer(features.stats), np.float32).copy()
    return Seen(tuple(np.split(flat, ends[:-1])), stats)


class Embeddings:
    """Embeddings of ids: rows of int8, and for each bucket its row or NO_ROW."""

    def __init__(
        self,
        row_of: NDArray[np.uint16],
        rows: NDArray[np.int8],
        scales: NDArray[np.float32],
    ) -> None:
        """Raise InvalidError if shapes, (BUCKETS,), (n, dims) and (dims,), or rows are wrong."""
        n, dims = rows.shape if rows.ndim == 2 else (0, 0)
        if not 1 <= dims <= lib.ODMA_FEATURES_DIMS or n >= NO_ROW or scales.shape != (dims,):
            raise InvalidError("rows", f"fewer than {NO_ROW:,}, scales for each dimension")
        known = row_of[row_of != NO_ROW]
        if row_of.shape != (BUCKETS,) or (known.size and int(known.max()) >= n):
            raise InvalidError("row_of", f"one of the rows or {NO_ROW} for {BUCKETS:,} buckets")
        self.dims: int = dims
        self.arrays = (
            np.ascontiguousarray(row_of, np.uint16),
            np.ascontiguousarray(rows, np.int8),
            np.ascontiguousarray(scales, np.float32),
        )
        kinds = ("uint16_t[]", "int8_t[]", "float[]")
        self._buffers = [
            ffi.from_buffer(kind, array) for kind, array in zip(kinds, self.arrays, strict=True)
        ]
        self._embeddings = ffi.new("odma_embeddings *", (*self._buffers, n, dims))

    @property
    def width(self) -> int:
        """How many numbers `embed` writes: GROUPS x dims, GROUPS and STATS."""
        return GROUPS * (self.dims + 1) + STATS

    def embed(self, text: bytes, prompt_tokens: int, into: NDArray[np.float32]) -> None:
        """Write a prompt's mean embeddings, the shares of ids that are known, its statistics.

        `into` is `width` float32 in one piece.
        """
        if into.shape != (self.width,):
            raise InvalidError("into", f"{self.width} numbers")
        features = _seen(text, prompt_tokens)
        at = ffi.from_buffer("float[]", into, require_writable=True)
        known = at + GROUPS * self.dims
        lib.odma_features_pool(features, self._embeddings, at, known)
        ffi.memmove(known + GROUPS, features.stats, 4 * STATS)


def _seen(text: bytes, prompt_tokens: int) -> Any:
    features = ffi.new("odma_features *")
    tokens = min(max(prompt_tokens, 0), MOST_TOKENS)
    lib.odma_features_see(ffi.from_buffer("uint8_t[]", text), len(text), tokens, features)
    return features
