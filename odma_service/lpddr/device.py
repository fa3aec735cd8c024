"""LPDDR devices: timings from a parameter file, channels, mapping, and what was measured.

A speed grade is a file of odma_service/data with a source beside each number. A device names a
grade and says how many channels there are. Both may be a file of the user's own.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from odma_service._native.lpddr import (
    CONTROLLER,
    ORGANISATION,
    REFRESHES,
    SCHEDULERS,
    TIMING,
    Estimator,
    LpddrModel,
)
from odma_service.errors import InvalidError
from odma_service.lpddr import mapping as mappings
from odma_service.pool.geometry import check_descriptor_seconds

DATA = Path(__file__).parent.parent / "data"
GRADE = "lpddr5-6400"

ENERGY = ("activate_nj", "precharge_nj", "read_nj", "write_nj", "refresh_all_nj", "standby_mw")
DEVICE = ["grade", "channels", "interleave_bytes", "mapping", "descriptor_seconds"]
MEASURED = ["run_bytes", "window", "bytes_per_second"]


@dataclass(frozen=True, slots=True, eq=False)
class Grade:
    """A speed grade: every number of its parameter file."""

    timing: Mapping[str, int]
    organisation: Mapping[str, int]
    controller: Mapping[str, Any]
    energy: Mapping[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class LpddrDevice:
    """A memory: channels of one grade behind an interleave.

    `descriptor_seconds` is what a serial DMA engine takes for one run. `measured` has figures of
    a real card, (run_bytes, window, bytes_per_second), which win over the model's.
    """

    grade: Grade = field(repr=False)
    channels: int = 1
    interleave_bytes: int = 256
    mapping: str | Mapping[str, Any] = mappings.INTERLEAVED
    descriptor_seconds: float = 0.0
    measured: tuple[tuple[int, int, float], ...] = ()

    def __post_init__(self) -> None:
        check_descriptor_seconds(self.descriptor_seconds)

    @property
    def clock_seconds(self) -> float:
        """Seconds of one CK."""
        return self.grade.timing["clock_ps"] * 1e-12

    @property
    def peak_bytes_per_second(self) -> float:
        """Bytes a second of all data buses together."""
        burst_seconds = self.grade.timing["burst_min"] * self.clock_seconds
        return self.channels * self.grade.organisation["burst_bytes"] / burst_seconds

    @property
    def memory_bytes(self) -> int:
        """Bytes of all channels."""
        organisation = self.grade.organisation
        banks = organisation["bank_groups"] * organisation["banks_per_group"]
        return self.channels * banks * organisation["rows"] * organisation["row_bytes"]

    def with_controller(self, **changes: Any) -> LpddrDevice:
        """Return this device with other controller settings, named as in the file."""
        _check_names("controller", changes, CONTROLLER, every=False)
        controller = {**self.grade.controller, **changes}
        return replace(self, grade=replace(self.grade, controller=controller))

    def model(self) -> LpddrModel:
        """Return the model to play traffic on. Raises InvalidError that names the field."""
        controller = dict(self.grade.controller)
        for name, known in (("scheduler", SCHEDULERS), ("refresh", REFRESHES)):
            if controller[name] not in known:
                raise InvalidError(
                    f"controller.{name}", f"one of {', '.join(known)}, not {controller[name]!r}"
                )
            controller[name] = known[controller[name]]
        return LpddrModel(
            self.grade.timing,
            self.grade.organisation,
            controller,
            mappings.parse(self.mapping, self.grade.organisation),
            self.channels,
            self.interleave_bytes,
        )

    def estimator(self, write_fraction: float = 0.0) -> Estimator:
        """Return an estimator calibrated by the model, corrected by what was measured."""
        return self.model().estimator(write_fraction, self.measured)

    def energy_nj(self, activations: float, reads: float, seconds: float) -> float:
        """Return the energy of reads by LPDDR4 figures: only good for ratios."""
        energy = self.grade.energy
        return (
            activations * (energy["activate_nj"] + energy["precharge_nj"])
            + reads * energy["read_nj"]
            + seconds * self.channels * energy["standby_mw"] * 1e6
        )


@lru_cache(maxsize=16)
def read_grade(name: str | Path = GRADE) -> Grade:
    """Return a grade by its name or its file. Raises InvalidError that names the key."""
    path = _find(name, "grade")
    table = _read(path)
    _check_names(str(path), table, ["timing", "organisation", "controller", "energy"])
    parts = {"timing": TIMING, "organisation": ORGANISATION, "controller": CONTROLLER}
    for part, names in (parts | {"energy": ENERGY}).items():
        if not isinstance(table[part], dict):
            raise InvalidError(part, "a table")
        _check_names(part, table[part], names)
        for key, value in table[part].items():
            _check_number(f"{part}.{key}", value, whole=part in ("timing", "organisation"))
    grade = Grade(table["timing"], table["organisation"], table["controller"], table["energy"])
    LpddrDevice(grade, mapping="RoBaRaCoCh").model()
    return grade


@lru_cache(maxsize=16)
def read_device(name: str | Path) -> LpddrDevice:
    """Return a device by its name or its file. Raises InvalidError that names the key."""
    path = _find(name, "device")
    table = _read(path)
    measured = table.pop("measured", [])
    _check_names(str(path), table, DEVICE)
    for key in ("channels", "interleave_bytes"):
        _check_number(key, table[key], whole=True)
    _check_number("descriptor_seconds", table["descriptor_seconds"], whole=False)
    if not isinstance(table["mapping"], str | dict) or not isinstance(table["grade"], str):
        raise InvalidError("mapping", "a name or a table; the grade a name")
    points = []
    for i, point in enumerate(measured):
        _check_names(f"measured[{i}]", point, MEASURED)
        points.append((point["run_bytes"], point["window"], float(point["bytes_per_second"])))
    grade = read_grade(table.pop("grade"))
    device = LpddrDevice(grade, measured=tuple(points), **table)
    device.model()
    return device


def _find(name: str | Path, kind: str) -> Path:
    """Return the file of a name of ours, or the path itself."""
    packaged = DATA / f"{name}.toml"
    if isinstance(name, str) and Path(name).name == name and packaged.exists():
        return packaged
    if not Path(name).is_file():
        known = ", ".join(sorted(path.stem for path in DATA.glob("*.toml")))
        raise InvalidError(kind, f"a file, or one of {known}; not {str(name)!r}")
    return Path(name)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidError(str(path), f"cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidError(str(path), f"is not TOML: {error}") from None


def _check_names(where: str, table: object, names: Sequence[str], *, every: bool = True) -> None:
    if not isinstance(table, dict):
        raise InvalidError(where, "must be a table")
    for name in table:
        if name not in names:
            raise InvalidError(f"{where}.{name}", f"unknown; known are {', '.join(names)}")
    for name in names if every else []:
        if name not in table:
            raise InvalidError(f"{where}.{name}", "is missing")


def _check_number(name: str, value: object, *, whole: bool) -> None:
    if name in ("controller.scheduler", "controller.refresh"):
        if not isinstance(value, str):
            raise InvalidError(name, "must be a name")
    elif name == "controller.wck_always_on":
        if not isinstance(value, bool):
            raise InvalidError(name, "true or false")
    elif isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise InvalidError(name, f"must be a {'whole ' if whole else ''}number")
    elif value < 0:
        raise InvalidError(name, "must not be negative")
