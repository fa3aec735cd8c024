"""Bandwidth of an access pattern, as the estimator expects it: what copies and reads cost.

Where figures of a real card were entered they correct the estimator, so they win here too.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from odma_service._native.lpddr import Estimator
from odma_service.lpddr.device import LpddrDevice

LONG_RUN_BYTES = 2**20
IN_FLIGHT = 16
READ, COPY, WRITE = 0.0, 0.5, 1.0
"""Share of the requests that write."""

_RUNS = 4096  # so many that their beginning and end do not count


@lru_cache(maxsize=16)
def estimator(device: LpddrDevice, write_fraction: float = READ) -> Estimator:
    """Return the device's estimator, calibrated (about a second) when first asked for."""
    return device.estimator(write_fraction)


def bandwidth(
    device: LpddrDevice,
    run_bytes: int = LONG_RUN_BYTES,
    window: int = IN_FLIGHT,
    write_fraction: float = READ,
    descriptor_seconds: float = 0.0,
) -> float:
    """Return bytes a second of many runs, `window` of them in flight.

    A copy's bytes count twice: they are read and written.
    """
    runs = np.zeros((_RUNS, 2), np.uint64)
    runs[:, 1] = run_bytes
    price = estimator(device, write_fraction).price(runs, window, descriptor_seconds)
    return _RUNS * run_bytes / price.seconds
