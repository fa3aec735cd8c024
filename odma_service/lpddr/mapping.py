"""Address mappings: which bits of a channel's address choose bank group, bank, row, column.

A mapping is named, or written from the highest field to the lowest, above the bytes of one
request: `row-bank[2]-col[5]-bg[2]-col[1]`. The row takes what is left. In a data file it may
also be a table of address bits, lowest first: column, group, bank, row, and the bits that are
XORed onto them: group_xor, bank_xor, row_xor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import count, islice

from odma_service._native.lpddr import COORDINATES
from odma_service.errors import InvalidError

Bits = dict[str, list[int]]

FIELD = re.compile(r"(row|bank|bg|col)(?:\[([0-9]{1,2})\])?")
COORDINATE = {"row": "row", "bank": "bank", "bg": "group", "col": "column"}

INTERLEAVED = "row-bank[2]-col[5]-bg[2]-col[1]"
"""The bank group changes every 64 bytes: linear reads reach the full rate."""


def parse(mapping: str | Mapping[str, object], organisation: Mapping[str, int]) -> Bits:
    """Return the address bits of each coordinate. Raises InvalidError that names the field."""
    if isinstance(mapping, Mapping):
        return _from_table(mapping)
    widths = {
        "row": _width(organisation, "rows"),
        "bank": _width(organisation, "banks_per_group"),
        "bg": _width(organisation, "bank_groups"),
        "col": _width(organisation, "row_bytes") - _width(organisation, "burst_bytes"),
    }
    if widths["col"] < 0:
        raise InvalidError("organisation.row_bytes", "at least burst_bytes")
    lowest = _width(organisation, "burst_bytes")
    if mapping == "RoBaRaCoCh":
        return _from_fields(["row", "bank", "bg", "col"], widths, lowest, mapping)
    if mapping == "MOP4CLXOR":
        return _mop(widths, lowest)
    return _from_fields(mapping.split("-"), widths, lowest, mapping)


def _mop(widths: Mapping[str, int], lowest: int) -> Bits:
    """Four requests to a bank, then the next; banks and rows XORed with the column."""
    if widths["col"] < 2:
        raise InvalidError("mapping", "MOP4CLXOR needs at least 4 requests a row")
    fields = ["row", f"col[{widths['col'] - 2}]", "bank", "bg", "col[2]"]
    bits = _from_fields(fields, widths, lowest, "MOP4CLXOR")
    spare = iter(bits["column"])
    for coordinate in ("group", "bank", "row"):
        bits[f"{coordinate}_xor"] = list(islice(spare, len(bits[coordinate])))
    return bits


def _from_fields(fields: list[str], widths: Mapping[str, int], lowest: int, mapping: str) -> Bits:
    bits: Bits = {coordinate: [] for coordinate in COORDINATE.values()}
    free = count(lowest)
    for field in reversed(fields):
        match = FIELD.fullmatch(field)
        if not match:
            raise InvalidError(
                "mapping", f"RoBaRaCoCh, MOP4CLXOR or such as {INTERLEAVED}, not {mapping!r}"
            )
        name, given = match.groups()
        width = widths[name] if given is None else int(given)
        bits[COORDINATE[name]] += islice(free, width)
    for name, width in widths.items():
        found = len(bits[COORDINATE[name]])
        if found != width:
            raise InvalidError("mapping", f"{name} has {found} bits, the organisation {width}")
    return bits


def _from_table(table: Mapping[str, object]) -> Bits:
    for name, bits in table.items():
        if name not in COORDINATES:
            raise InvalidError(f"mapping.{name}", f"unknown; known are {', '.join(COORDINATES)}")
        if not isinstance(bits, list) or not all(
            type(bit) is int and 0 <= bit < 64 for bit in bits
        ):
            raise InvalidError(f"mapping.{name}", "a list of address bits, 0 to 63")
    return {name: list(bits) for name, bits in table.items()}  # type: ignore[call-overload]


def _width(organisation: Mapping[str, int], name: str) -> int:
    value = organisation[name]
    if value < 1 or value & (value - 1):
        raise InvalidError(f"organisation.{name}", f"a power of two, not {value}")
    return value.bit_length() - 1
