"""What reading one sequence's KV cache costs in different layouts.

Decode reads every plane of a sequence once a step. A plane is one run if the sequence is
contiguous, a run for each page if it is paged, for each token if every token has a slot.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from odma_service.errors import InvalidError
from odma_service.lpddr.bandwidth import bandwidth, estimator
from odma_service.lpddr.device import LpddrDevice
from odma_service.pool.geometry import MOST_PLANES

PAGES_TOKENS = (256, 64, 16)
MOST_RUNS = 1 << 24
PLOTTED_BYTES = tuple(64 << i for i in range(17))
PLOTTED_WINDOWS = (1, 4, 16, 64)


class Layout(NamedTuple):
    """A layout and its price. relative_* compare with the contiguous one."""

    name: str
    run_bytes: int
    runs: int
    seconds: float
    bytes_per_second: float
    relative_bandwidth: float
    activations: int
    relative_energy: float


def compare(
    device: LpddrDevice, tokens: int, bytes_per_token: int, planes: int, window: int
) -> list[Layout]:
    """Return the price of reading a sequence: contiguous, in pages, in slots of one token."""
    for name, value in (("tokens", tokens), ("bytes_per_token", bytes_per_token)):
        if not 1 <= value <= 1 << 24:
            raise InvalidError(name, f"1 to 2^24, not {value}")
    if not 1 <= planes <= MOST_PLANES:
        raise InvalidError("planes", f"1 to {MOST_PLANES:,}, not {planes}")
    if planes * tokens > MOST_RUNS:
        raise InvalidError("tokens", f"at most {MOST_RUNS:,} over all planes")
    layouts: list[Layout] = []
    least_energy = 0.0
    pages = [("contiguous", tokens)]
    pages += [(f"pages of {page}", page) for page in PAGES_TOKENS if page < tokens]
    pages += [("slots of a token", 1)] if tokens > 1 else []
    for name, page in pages:
        runs = _runs(tokens, page, bytes_per_token, planes)
        price = estimator(device).price(runs, window, device.descriptor_seconds)
        moved = tokens * bytes_per_token * planes
        energy = device.energy_nj(price.activations, price.requests, price.seconds)
        least_energy = least_energy or energy
        speed = moved / price.seconds
        layouts.append(
            Layout(
                name,
                int(runs[0, 1]),
                len(runs),
                price.seconds,
                speed,
                speed / (layouts[0].bytes_per_second if layouts else speed),
                price.activations,
                energy / least_energy,
            )
        )
    return layouts


def _runs(tokens: int, page: int, bytes_per_token: int, planes: int) -> np.ndarray:
    """Return the runs of all planes; the last page of a plane may be shorter."""
    starts = np.arange(0, tokens, page, dtype=np.uint64)
    lengths = np.minimum(page, tokens - starts) * np.uint64(bytes_per_token)
    # Pages lie anywhere: each at a multiple of its own size, so none shares a request.
    offsets = starts * np.uint64(bytes_per_token)
    return np.tile(np.stack([offsets, lengths], axis=1), (planes, 1)).astype(np.uint64)


def bandwidth_curves(device: LpddrDevice) -> dict[int, list[float]]:
    """Return bytes a second over PLOTTED_BYTES of run length, by runs in flight."""
    serial = device.descriptor_seconds
    return {
        window: [
            bandwidth(device, length, window, descriptor_seconds=serial) for length in PLOTTED_BYTES
        ]
        for window in PLOTTED_WINDOWS
    }
