"""EmulatorService: the cost of an access pattern on the device's memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np

from odma_service.errors import InvalidError
from odma_service.lpddr import COPY, READ, WRITE, LpddrDevice, estimator, read_device
from odma_service.pool.geometry import PRESETS, check_descriptor_seconds
from odma_service.rpc.v1 import emulator_service_pb2 as pb
from odma_service.rpc.v1.emulator_service_pb2_grpc import EmulatorServiceServicer
from odma_service.service.rpc.statuses import reports_errors

MOST_RUNS = 131_072
MOST_OFFSET_BYTES = 1 << 53
MOST_LENGTH_BYTES = 1 << 40
DEFAULT_PRESET = "mlu370-x4"

WRITTEN = {
    pb.ACCESS_UNSPECIFIED: READ,
    pb.ACCESS_READ: READ,
    pb.ACCESS_WRITE: WRITE,
    pb.ACCESS_COPY: COPY,
}


class EmulatorService(EmulatorServiceServicer):
    """Prices runs.

    It calibrates one device and access at a time, in a thread of its own: all use the outcome, so
    no caller is charged for it.
    """

    def __init__(self) -> None:
        self._calibrating = ThreadPoolExecutor(1, thread_name_prefix="calibrate")

    @reports_errors
    def EstimateAccess(
        self, request: pb.EstimateAccessRequest, context: grpc.ServicerContext
    ) -> pb.EstimateAccessResponse:
        if request.access not in WRITTEN:
            raise InvalidError("access", "ACCESS_READ, ACCESS_WRITE or ACCESS_COPY")
        device, slowdown, descriptor_seconds = _device_from(request)
        runs = _runs_from(request)
        moved = int(runs[:, 1].sum())
        if request.access == pb.ACCESS_COPY:
            runs, moved = np.repeat(runs, 2, axis=0), 2 * moved
            descriptor_seconds /= 2  # one descriptor reads and writes
        calibrated = self._calibrating.submit(estimator, device, WRITTEN[request.access]).result()
        price = calibrated.price(runs, request.window, descriptor_seconds / slowdown)
        seconds = price.seconds * slowdown
        return pb.EstimateAccessResponse(
            seconds=seconds,
            activations=price.activations,
            bytes_per_second=moved / seconds if seconds > 0 else 0,
        )


def _device_from(request: pb.EstimateAccessRequest) -> tuple[LpddrDevice, float, float]:
    """Return the device, its slowdown to the bandwidth asked for, and seconds per descriptor."""
    asked = request.device
    preset = asked.preset or DEFAULT_PRESET
    if preset not in PRESETS:
        raise InvalidError("device.preset", f"one of {', '.join(PRESETS)}, not {preset!r}")
    device = read_device(preset)
    slowdown, descriptor_seconds = 1.0, device.descriptor_seconds
    if asked.HasField("bandwidth_bytes_per_second"):
        if not 1e6 <= asked.bandwidth_bytes_per_second <= 1e15:
            raise InvalidError("device.bandwidth_bytes_per_second", "1e6 to 1e15")
        slowdown = device.peak_bytes_per_second / asked.bandwidth_bytes_per_second
    if asked.HasField("descriptor_seconds"):
        descriptor_seconds = asked.descriptor_seconds
    check_descriptor_seconds(descriptor_seconds / slowdown, "device.descriptor_seconds")
    return device, slowdown, descriptor_seconds


def _runs_from(request: pb.EstimateAccessRequest) -> np.ndarray:
    if len(request.runs) > MOST_RUNS:
        raise InvalidError("runs", f"at most {MOST_RUNS:,}, not {len(request.runs):,}")
    pairs = [(run.offset_bytes, run.length_bytes) for run in request.runs]
    runs = np.array(pairs, np.uint64).reshape(-1, 2)
    offsets, lengths = runs[:, 0], runs[:, 1]
    for i in np.flatnonzero(offsets >= MOST_OFFSET_BYTES):
        raise InvalidError(f"runs[{i}].offset_bytes", "below 2^53")
    for i in np.flatnonzero((lengths < 1) | (lengths > MOST_LENGTH_BYTES)):
        raise InvalidError(f"runs[{i}].length_bytes", "1 to 2^40")
    return runs
