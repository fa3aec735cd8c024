"""What reading and writing LPDDR memory costs: devices, mappings, layouts, reference rows."""

from odma_service._native.lpddr import Estimator, Played, Price, Traffic
from odma_service.lpddr.bandwidth import COPY, READ, WRITE, bandwidth, estimator
from odma_service.lpddr.device import Grade, LpddrDevice, read_device, read_grade

__all__ = [
    "COPY",
    "READ",
    "WRITE",
    "Estimator",
    "Grade",
    "LpddrDevice",
    "Played",
    "Price",
    "Traffic",
    "bandwidth",
    "estimator",
    "read_device",
    "read_grade",
]
