"""The LPDDR models: a device that can be played traffic, and an estimator calibrated by it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from odma_service._native._odma import ffi, lib
from odma_service._native.rules import broken_rule, new_reason, sentence_of, set_field
from odma_service.errors import InvalidError, OdmaError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

SCHEDULERS = {"frfcfs": lib.ODMA_LPDDR_FRFCFS, "frfcfs-rowhit": lib.ODMA_LPDDR_FRFCFS_ROW_HIT}
REFRESHES = {
    "none": lib.ODMA_LPDDR_REFRESH_NONE,
    "all-bank": lib.ODMA_LPDDR_REFRESH_ALL_BANK,
    "per-bank": lib.ODMA_LPDDR_REFRESH_PER_BANK,
}
COORDINATES = ("column", "group", "bank", "row", "group_xor", "bank_xor", "row_xor")


def _fields(struct: str) -> tuple[str, ...]:
    return tuple(name for name, _ in ffi.typeof(struct).fields)


TIMING, ORGANISATION, CONTROLLER = map(
    _fields, ("odma_lpddr_timing", "odma_lpddr_organisation", "odma_lpddr_controller")
)
MOST_WINDOW: int = lib.ODMA_LPDDR_WINDOW


class Traffic(NamedTuple):
    """What a device is asked. chunk_bytes 0 needs `runs`; window 0 never runs dry."""

    chunk_bytes: int = 0
    requests: int = 0
    warmup_requests: int = 0
    sequential: bool = False
    write_fraction: float = 0.0
    window: int = 0
    descriptor_ck: int = 0
    seed: int = 1


class Played(NamedTuple):
    """What traffic did: counts over all channels, and how long it took."""

    requests: int
    cycles: int
    row_hits: int
    activates: int
    reads: int
    writes: int
    precharges: int
    precharges_all: int
    refreshes_all: int
    refreshes_bank: int
    wck_syncs: int
    seconds: float
    bytes_per_second: float
    fraction_of_peak: float


class Price(NamedTuple):
    """What moving a list of runs costs."""

    seconds: float
    activations: int
    requests: int


class LpddrModel:
    """A device, checked once."""

    def __init__(
        self,
        timing: Mapping[str, int],
        organisation: Mapping[str, int],
        controller: Mapping[str, float],
        mapping: Mapping[str, Sequence[int]],
        channels: int,
        interleave_bytes: int,
    ) -> None:
        """Raise InvalidError that names the field if no device can be so."""
        self._device = ffi.new("odma_lpddr_device *")
        device = self._device
        for name, values in (
            ("timing", timing),
            ("organisation", organisation),
            ("controller", controller),
        ):
            for field, value in values.items():
                set_field(getattr(device, name), field, value, f"{name}.{field}")
        for field in COORDINATES:
            bits = list(mapping.get(field, ()))
            if len(bits) > lib.ODMA_LPDDR_BITS:
                raise InvalidError(f"mapping.{field}", f"at most {lib.ODMA_LPDDR_BITS} bits")
            padded = bits + [lib.ODMA_LPDDR_NO_BIT] * (lib.ODMA_LPDDR_BITS - len(bits))
            set_field(device.mapping, field, padded, f"mapping.{field}")
        set_field(device, "channels", channels, "channels")
        set_field(device, "interleave_bytes", interleave_bytes, "interleave_bytes")
        reason = new_reason()
        _insist(lib.odma_lpddr_check(device, reason), reason)

    def locate(self, address: int) -> tuple[int, int, int, int]:
        """Return bank group, bank, row and column of an address of one channel."""
        places = [ffi.new("uint32_t *") for _ in range(4)]
        if lib.odma_lpddr_locate(self._device, address, *places) != lib.ODMA_OK:
            raise InvalidError("address", "inside the channel")
        group, bank, row, column = (place[0] for place in places)
        return group, bank, row, column

    def play(self, traffic: Traffic, runs: NDArray[np.uint64] | None = None) -> Played:
        """Play traffic, or the given runs once each, and count what happens."""
        asked = ffi.new("odma_lpddr_traffic *")
        for field in traffic._fields:
            if field != "sequential":
                set_field(asked, field, getattr(traffic, field), field)
        asked.pattern = lib.ODMA_LPDDR_SEQUENTIAL if traffic.sequential else lib.ODMA_LPDDR_RANDOM
        array = None if runs is None else _runs(runs)
        if array is not None:
            asked.pattern = lib.ODMA_LPDDR_RUNS
            asked.runs = ffi.cast("odma_run *", ffi.from_buffer(array))
            asked.run_count = len(array)
        result, reason = ffi.new("odma_lpddr_result *"), new_reason()
        _insist(lib.odma_lpddr_run(self._device, asked, result, reason), reason)
        return Played(*(getattr(result, field) for field in Played._fields))

    def estimator(
        self,
        write_fraction: float = 0.0,
        measured: Sequence[tuple[int, int, float]] = (),
    ) -> Estimator:
        """Calibrate an estimator. `measured`: (run_bytes, window, bytes_per_second)."""
        made, reason = ffi.new("odma_estimator **"), new_reason()
        try:
            points = ffi.new("odma_lpddr_measured[]", [tuple(point) for point in measured])
        except (OverflowError, TypeError) as error:
            raise InvalidError("measured", str(error)) from None
        status = lib.odma_estimator_create(
            self._device, write_fraction, points, len(measured), made, reason
        )
        _insist(status, reason)
        return Estimator(made[0])


class Estimator:
    """Prices lists of runs; does not change, so any thread may ask it."""

    def __init__(self, estimator: Any) -> None:
        """Use LpddrModel.estimator."""
        self._estimator = ffi.gc(estimator, lib.odma_estimator_close)

    def price(
        self, runs: NDArray[np.uint64], window: int = 0, descriptor_seconds: float = 0.0
    ) -> Price:
        """Return what runs cost: rows of offset and length in bytes. window 0: all in flight."""
        array, price = _runs(runs), ffi.new("odma_price *")
        pointer = ffi.cast("odma_run *", ffi.from_buffer(array))
        if not 0 <= window <= MOST_WINDOW:
            raise InvalidError("window", f"0 to {MOST_WINDOW:,}")
        if not 0 <= descriptor_seconds <= 1:
            raise InvalidError("descriptor_seconds", "0 to 1")
        status = lib.odma_estimator_price(
            self._estimator, pointer, len(array), window, descriptor_seconds, price
        )
        if status != lib.ODMA_OK:
            raise InvalidError("runs", "each at least 1 byte long, ending below 2^64")
        return Price(price.seconds, price.activations, price.requests)


def _runs(runs: NDArray[np.uint64]) -> NDArray[np.uint64]:
    array = np.ascontiguousarray(runs, np.uint64)
    if array.ndim != 2 or array.shape[1] != 2:
        raise InvalidError("runs", "rows of offset and length")
    return array


def _insist(status: int, reason: Any) -> None:
    if status == lib.ODMA_OK:
        return
    if status == lib.ODMA_INVALID:
        raise broken_rule(reason)
    raise OdmaError(sentence_of(reason))
