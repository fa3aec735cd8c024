"""Geometry: what a token of a pool's memory is made of, and what moving it costs.

A plane is a run of memory indexed by token: the K or the V of one layer, say. A region is
the same token range in every plane, so all that a copy costs follows from how many planes
there are and how many bytes a token takes in each.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, replace
from hashlib import blake2b

from odma_service.errors import InvalidError
from odma_service.values import PlaneGroup

MOST_GROUPS = 64
MOST_PLANES = 4096
MOST_PLANE_BYTES = 2**24
MOST_ALIGNMENT_BYTES = 2**20
MOST_MODEL_LENGTH_TOKENS = 2**24


@dataclass(frozen=True, slots=True)
class Geometry:
    """The planes of one rank's memory.

    >>> Geometry((PlaneGroup(56, 1024),)).bytes_per_token
    57344
    """

    planes: tuple[PlaneGroup, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.planes) <= MOST_GROUPS:
            raise InvalidError("planes", f"1 to {MOST_GROUPS} groups, not {len(self.planes)}")
        for i, group in enumerate(self.planes):
            insist_count(f"planes[{i}].count", group.count, MOST_PLANES)
            insist_count(f"planes[{i}].bytes_per_token", group.bytes_per_token, MOST_PLANE_BYTES)
            alignment = group.alignment_bytes
            insist_count(f"planes[{i}].alignment_bytes", alignment, MOST_ALIGNMENT_BYTES)
            if alignment & (alignment - 1):
                raise InvalidError(
                    f"planes[{i}].alignment_bytes", f"must be a power of two, not {alignment}"
                )
        if self.plane_count > MOST_PLANES:
            raise InvalidError(
                "planes", f"at most {MOST_PLANES:,} planes in all, not {self.plane_count:,}"
            )

    @property
    def plane_count(self) -> int:
        """Planes in all groups."""
        return sum(group.count for group in self.planes)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all planes."""
        return sum(group.count * group.bytes_per_token for group in self.planes)

    def tokens_in(self, capacity_bytes: int) -> int:
        """Return how many whole tokens fit into so many bytes over all planes."""
        return capacity_bytes // self.bytes_per_token

    def check_alignment(self, block_tokens: int) -> None:
        """Raise InvalidError unless every block starts aligned in every plane."""
        for i, group in enumerate(self.planes):
            if block_tokens * group.bytes_per_token % group.alignment_bytes:
                raise InvalidError(
                    f"planes[{i}].alignment_bytes",
                    f"must divide a block of {block_tokens} x {group.bytes_per_token} bytes",
                )

    def digest(self, block_tokens: int) -> int:
        """Return 64 bits that stand for the planes and the block size."""
        planes = [astuple(group) for group in self.planes]
        text = json.dumps([block_tokens, planes], separators=(",", ":"))
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Device:
    """What copies are priced from.

    `descriptor_seconds` is what one copy descriptor costs on top of its bytes. It is not
    published for the presets: 100 ns is an assumption, to be replaced by a measurement.
    `copy_efficiency` is what copies of long runs reach of the bandwidth: for the presets, what
    the LPDDR emulation gives (tests/test_lpddr.py holds it to that).
    """

    preset: str = "mlu370-x4"
    memory_bytes: int = 24 * 2**30
    bandwidth_bytes_per_second: float = 307.2e9
    descriptor_seconds: float = 100e-9
    copy_efficiency: float = 0.89

    def __post_init__(self) -> None:
        if not 1e6 <= self.bandwidth_bytes_per_second <= 1e15:
            raise InvalidError("bandwidth_bytes_per_second", "1e6 to 1e15")
        check_descriptor_seconds(self.descriptor_seconds)
        if not 0 < self.copy_efficiency <= 1:
            raise InvalidError("copy_efficiency", "above 0, at most 1")

    def token_seconds(self, bytes_per_token: int) -> float:
        """Return what copying one token costs: every byte is read and written."""
        return 2 * bytes_per_token / (self.bandwidth_bytes_per_second * self.copy_efficiency)


def check_descriptor_seconds(seconds: float, field: str = "descriptor_seconds") -> None:
    """Raise InvalidError unless a copy descriptor may take so long."""
    if not 0 <= seconds <= 1:
        raise InvalidError(field, "0 to 1")


PRESETS = {
    "mlu370-x4": Device(),
    "mlu370-x8": Device("mlu370-x8", 48 * 2**30, 614.4e9, copy_efficiency=0.87),
}


def device(
    preset: str = "",
    bandwidth_bytes_per_second: float | None = None,
    descriptor_seconds: float | None = None,
) -> Device:
    """Return a preset ("": mlu370-x4) with the given figures in place of its own."""
    chosen = PRESETS.get(preset or "mlu370-x4")
    if chosen is None:
        raise InvalidError("preset", f"one of {', '.join(PRESETS)}, not {preset!r}")
    if bandwidth_bytes_per_second is not None:
        chosen = replace(chosen, bandwidth_bytes_per_second=bandwidth_bytes_per_second)
    if descriptor_seconds is not None:
        chosen = replace(chosen, descriptor_seconds=descriptor_seconds)
    return chosen


def insist_count(field: str, value: object, most: int) -> None:
    """Raise InvalidError unless the value is a whole number from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise InvalidError(field, f"must be a whole number from 1 to {most:,}")
