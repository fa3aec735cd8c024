"""Rules: C has them, and says which one is broken; Python shows C's sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from odma_service._native._odma import ffi, lib
from odma_service.errors import InvalidError

if TYPE_CHECKING:
    from collections.abc import Sequence

_TYPE_RULES = {
    "uint8_t": "whole numbers from 0 to 255",
    "uint32_t": "a whole number from 0 to 2^32 - 1",
    "uint64_t": "a whole number from 0 to 2^64 - 1",
    "double": "a number",
}


def new_reason() -> Any:
    """Return room for the sentence of a C function."""
    return ffi.new("char[]", lib.ODMA_REASON_BYTES)


def sentence_of(reason: Any) -> str:
    """Return what a C function wrote."""
    return str(ffi.string(reason).decode(errors="replace"))


def broken_rule(reason: Any) -> InvalidError:
    """Return the error for "field: rule", as C writes it."""
    field, _, rule = sentence_of(reason).partition(": ")
    return InvalidError(field, rule)


def set_field(struct: Any, field: str, value: object, name: str | None = None) -> None:
    """Set a field. Raises InvalidError with its name if C's type has no such value."""
    try:
        setattr(struct, field, value)
    except (OverflowError, TypeError):
        raise InvalidError(name or field, _type_rule(struct, field, value)) from None


def set_items(struct: Any, field: str, values: Sequence[object]) -> None:
    """Set an array from its beginning. Raises InvalidError like set_field, and for too many."""
    items = getattr(struct, field)
    if len(values) > len(items):
        raise InvalidError(field, f"at most {len(items)}, not {len(values)}")
    for i, value in enumerate(values):
        try:
            items[i] = value
        except (OverflowError, TypeError):
            raise InvalidError(field, _type_rule(struct, field, value)) from None


def _type_rule(struct: Any, field: str, value: object) -> str:
    kind = ffi.typeof(struct)
    kind = dict((kind.item if kind.kind == "pointer" else kind).fields)[field].type
    kind = kind.item if kind.kind == "array" else kind
    return f"must be {_TYPE_RULES.get(kind.cname, kind.cname)}, not {value!r}"


def set_name(struct: Any, name: str, path: str) -> None:
    """Set `struct.name`. Raises InvalidError for a name that is too long or has a NUL."""
    data = name.encode(errors="replace")
    if len(data) > lib.ODMA_NAME_BYTES or b"\0" in data:
        raise InvalidError(path, f"1 to {lib.ODMA_NAME_BYTES} bytes without NUL")
    struct.name = data
