"""Operations and their results, as Python values and as C structs.

A number that its C field cannot hold is a mistake of the whole batch: InvalidError names
it. A bad name, id, guess or text inside one allocate is that operation's own result. C has
no room for those values, so it gets an empty request id, which it refuses, and a digest of
the operation, which keeps the batch's fingerprint apart from others.
"""

from __future__ import annotations

import struct
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

from odma_service._native._odma import ffi, lib
from odma_service.errors import InvalidError
from odma_service.values import (
    Allocate,
    Copy,
    Extend,
    Free,
    Freed,
    Op,
    Place,
    Prediction,
    Reason,
    Refusal,
    Result,
    Text,
    Trim,
    Used,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from odma_service.values import Batch, Predicted

ID_BYTES: int = lib.ODMA_ID_BYTES
NAME_BYTES: int = lib.ODMA_NAME_BYTES
MOST_TEXT_BYTES: int = lib.ODMA_TEXT_BYTES
TEXT_RULE = f"up to {MOST_TEXT_BYTES:,} bytes of UTF-8"
_NAME_RULE = f"up to {NAME_BYTES} bytes of UTF-8 without NUL"

_FREE, _TRIM, _EXTEND, _ALLOCATE = (
    lib.ODMA_OP_FREE,
    lib.ODMA_OP_TRIM,
    lib.ODMA_OP_EXTEND,
    lib.ODMA_OP_ALLOCATE,
)
_GIVEN_MAX_TOTAL, _GIVEN_RISK, _GIVEN_QUANTILES = (
    lib.ODMA_GIVEN_MAX_TOTAL,
    lib.ODMA_GIVEN_RISK,
    lib.ODMA_GIVEN_QUANTILES,
)
_PLACED, _FREED, _ALREADY_FREE = lib.ODMA_PLACED, lib.ODMA_FREED, lib.ODMA_ALREADY_FREE
_NO_RULE = lib.ODMA_RULE_NONE

_REASONS: dict[int, Reason] = {int(reason): reason for reason in Reason}
_NEW_FREED = Freed(already_free=False)
_OLD_FREED = Freed(already_free=True)

RULES: dict[int, tuple[str, str]] = {
    lib.ODMA_RULE_HANDLE_DEAD: ("handle", "its region must be live"),
    lib.ODMA_RULE_HANDLE_UNKNOWN: ("handle", "must have been issued in this epoch"),
    lib.ODMA_RULE_END: ("end", "must be FINISHED, HIT_LIMIT, ABORTED or PREEMPTED"),
    lib.ODMA_RULE_OUTPUT_TOKENS: ("output_tokens", "at most 2^24"),
    lib.ODMA_RULE_LEAST_TOKENS: (
        "least_tokens",
        "1 to the request's maximum, rounded up to a block",
    ),
    lib.ODMA_RULE_WANT_TOKENS: ("want_tokens", "0, or least_tokens to 2^28"),
    lib.ODMA_RULE_TO_TOKENS: (
        "to_tokens",
        "1 to the present length, at least what is used, reused, or has keys",
    ),
    lib.ODMA_RULE_REQUEST_ID: ("request_id", f"1 to {ID_BYTES} bytes of UTF-8 without NUL"),
    lib.ODMA_RULE_REQUEST_ID_CHANGED: ("request_id", "lives with other numbers"),
    lib.ODMA_RULE_PROMPT_TOKENS: (
        "prompt_tokens",
        "at least 1, with generated_tokens at most max_total_tokens",
    ),
    lib.ODMA_RULE_MAX_TOTAL_TOKENS: ("max_total_tokens", "1 to the capacity"),
    lib.ODMA_RULE_OVERFLOW_RISK: ("overflow_risk", "0 to 1"),
    lib.ODMA_RULE_QUANTILES: ("prediction", "finite, at least 0, ascending"),
    lib.ODMA_RULE_KIND: ("op", "must be free, trim, extend or allocate"),
    lib.ODMA_RULE_COUNTS: ("ops", "too many ops or used"),
    lib.ODMA_RULE_COMPLETED_SEQ: ("completed_seq", "never falls, at most the last answered seq"),
    lib.ODMA_RULE_USED_HANDLE: ("handle", "its region must be live, and listed once"),
    lib.ODMA_RULE_USED_TOKENS: ("used_tokens", "at most the region's length"),
    lib.ODMA_RULE_REQUEST_ID_TWICE: (
        "request_id",
        "asked for by an earlier operation of the batch",
    ),
    lib.ODMA_RULE_TENANT_MAX_TOTAL: ("max_total_tokens", "at most what its tenant may hold"),
    lib.ODMA_RULE_TENANT_PROMPT: (
        "prompt_tokens",
        "with generated_tokens and one more at most what its tenant may hold",
    ),
    lib.ODMA_RULE_KEYS: (
        "keys",
        "whole keys of 16 bytes, at most 4,096 and the granules of prompt and generated tokens",
    ),
    lib.ODMA_RULE_NO_GRANULES: ("keys", "only in a pool opened with granule_tokens"),
    lib.ODMA_RULE_KEEP_TOKENS: (
        "keep_tokens",
        "at most the larger of used_tokens and reused_tokens",
    ),
    lib.ODMA_RULE_FREE_KEYS: (
        "keys",
        "whole keys of 16 bytes, with those of the Allocate at most the granules of keep_tokens",
    ),
    lib.ODMA_RULE_BATCH_KEYS: ("ops", "at most 8,192 keys in all"),
    lib.ODMA_RULE_SHAREABLE_TOKENS: (
        "shareable_tokens",
        "at most used_tokens, and 0 in a pool without granule_tokens",
    ),
    lib.ODMA_RULE_PADDING: ("request_id", "like all names it must end with zero bytes only"),
}
"""Field and sentence of each odma_rule."""

_TENANT_RULES = {lib.ODMA_RULE_TENANT_MAX_TOTAL, lib.ODMA_RULE_TENANT_PROMPT}
_USED_RULES = {
    lib.ODMA_RULE_USED_HANDLE,
    lib.ODMA_RULE_USED_TOKENS,
    lib.ODMA_RULE_SHAREABLE_TOKENS,
}
_KINDS: dict[type, str] = {Free: "free", Trim: "trim", Extend: "extend", Allocate: "allocate"}
_WIDE = {"handle", "seq", "completed_seq"}
_OPTIONAL = {"max_total_tokens", "predicted_output_tokens", "overflow_risk", "max_copy_tokens"}
_NOT_NUMBERS = {"request_id", "request_class", "tenant", "text", "keys", "used", "ops"}


# --- to C ---

_USED = "QIII4x"
assert struct.calcsize("=" + _USED) == ffi.sizeof("odma_used")


def used_array(used: Sequence[Used]) -> Any:
    """Return `used` as an odma_used[]. A decode step lists them all, so they are packed at once."""
    try:
        packed = struct.pack("=" + _USED * len(used), *chain.from_iterable(used))
        return ffi.from_buffer("odma_used[]", packed)
    except (struct.error, TypeError):
        for i, entry in enumerate(used):
            check_numbers(f"used[{i}].", entry)
        raise


def ops_array(ops: Sequence[Op], predictions: Sequence[Predicted | None] | None) -> Any:
    """Return `ops` with their predictions as an odma_op[]."""
    if predictions is None:
        predictions = (None,) * len(ops)
    elif len(predictions) != len(ops):
        raise InvalidError("predictions", f"one for each of {len(ops)} operations")
    try:
        return ffi.new("odma_op[]", list(map(_fields, ops, predictions)))
    except (OverflowError, TypeError, IndexError):
        for i, op in enumerate(ops):
            _check_op(f"ops[{i}]", op)
        raise InvalidError("predictions", "seven numbers for each, or None") from None


def op_struct(op: Op, prediction: Predicted | None) -> Any:
    """Return `op`, which stands alone, as an odma_op *."""
    try:
        return ffi.new("odma_op *", _fields(op, prediction))
    except (OverflowError, TypeError, IndexError):
        _check_op("", op)
        raise InvalidError("prediction", "seven numbers, or None") from None


def _fields(op: Op, prediction: Predicted | None) -> dict[str, object] | tuple[int, ...]:
    """Return the fields of an odma_op: the first ones, which takes less time, or named ones."""
    if isinstance(op, Extend):
        handle, least_tokens, want_tokens = op
        return _EXTEND, 0, handle, 0, least_tokens, want_tokens
    if isinstance(op, Allocate):
        return _allocate_fields(op, prediction)
    if isinstance(op, Free):
        return {
            "kind": _FREE,
            "handle": op.handle,
            "end": op.end,
            "output_tokens": op.output_tokens,
            "keep_tokens": op.keep_tokens,
            **_keys(op),
        }
    if isinstance(op, Trim):
        handle, to_tokens = op
        return _TRIM, 0, handle, 0, to_tokens
    raise TypeError(op)


def _allocate_fields(op: Allocate, prediction: Predicted | None) -> dict[str, object]:
    fields = _texts(op)
    if isinstance(fields, _Flaw):
        fields = {"text_digest": _halves(Text(_shown(op).encode()))}
    fields.update(_keys(op))
    fields["kind"] = _ALLOCATE
    fields["prompt_tokens"] = op.prompt_tokens
    fields["generated_tokens"] = op.generated_tokens
    fields["guess_tokens"] = op.predicted_output_tokens or 0
    given = 0
    if op.max_total_tokens is not None:
        fields["max_total_tokens"] = op.max_total_tokens
        given |= _GIVEN_MAX_TOTAL
    if op.overflow_risk is not None:
        fields["overflow_risk"] = op.overflow_risk
        given |= _GIVEN_RISK
    if type(prediction) is Prediction:
        fields["raw"] = prediction.raw
        prediction = prediction.quantiles
    if prediction is not None:
        fields["quantiles"] = prediction
        given |= _GIVEN_QUANTILES
    fields["given"] = given
    return fields


def _keys(op: Allocate | Free) -> dict[str, object]:
    """Return the keys of `op` as C takes them: where they lie, while the operation lives."""
    if not op.keys:
        return {}
    return {"keys": ffi.from_buffer("uint8_t[]", op.keys), "key_bytes": len(op.keys)}


class _Flaw(NamedTuple):
    """A field, and the rule it breaks, whose value C cannot be shown."""

    field: str
    rule: str


def _texts(op: Allocate) -> dict[str, object] | _Flaw:
    """Return the texts of `op` as C takes them, or what is wrong with it."""
    request_id = _packed(op.request_id, ID_BYTES)
    if request_id is None:
        return _Flaw(*RULES[lib.ODMA_RULE_REQUEST_ID])
    request_class = _packed(op.request_class, NAME_BYTES)
    if request_class is None:
        return _Flaw("request_class", _NAME_RULE)
    tenant = _packed(op.tenant, NAME_BYTES)
    if tenant is None:
        return _Flaw("tenant", _NAME_RULE)
    if op.predicted_output_tokens == 0:
        return _Flaw("predicted_output_tokens", "at least 1")
    texts: dict[str, object] = {
        "request_id": request_id,
        "request_class": request_class,
        "tenant": tenant,
    }
    if op.text is None:
        return texts
    text = text_of(op.text)
    if text is None:
        return _Flaw("text", TEXT_RULE)
    texts["text_digest"] = _halves(text)
    return texts


def text_of(text: object) -> Text | None:
    """Return the text of an Allocate, None if it is none: up to MOST_TEXT_BYTES of UTF-8."""
    if isinstance(text, str):
        try:
            text = Text.of(text)
        except UnicodeEncodeError:
            return None
    return text if isinstance(text, Text) and len(text) <= MOST_TEXT_BYTES else None


def _packed(text: object, most_bytes: int) -> bytes | None:
    """Return `text` in UTF-8, or None if it is none, too long, or has a NUL."""
    if not isinstance(text, str) or "\0" in text:
        return None
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return None
    return data if len(data) <= most_bytes else None


def _shown(op: Allocate) -> str:
    """Return all that an operation says, its text as a str."""
    if isinstance(op.text, Text):
        op = op._replace(text=op.text.data.decode(errors="surrogateescape"))
    return repr(op)


def _halves(text: Text) -> tuple[int, int]:
    first, second = text.digest[:8], text.digest[8:]
    return int.from_bytes(first, "little"), int.from_bytes(second, "little")


def _check_op(path: str, op: Op) -> None:
    kind = _KINDS.get(type(op))
    if kind is None:
        raise InvalidError(path or "op", "must be one of Free, Trim, Extend and Allocate")
    if isinstance(op, Free | Allocate) and not isinstance(op.keys, bytes):
        raise InvalidError(f"{path}.keys" if path else "keys", "must be bytes")
    check_numbers(f"{path}.{kind}." if path else f"{kind}.", op)


def check_numbers(path: str, record: Batch | Used | Op) -> None:
    """Raise InvalidError for a field of `record` that is not a number which C can hold."""
    for field, value in record._asdict().items():
        if field in _NOT_NUMBERS or (value is None and field in _OPTIONAL):
            continue
        if field == "overflow_risk":
            if not isinstance(value, int | float):
                raise InvalidError(path + field, "must be a number")
            continue
        if not isinstance(value, SupportsIndex):
            raise InvalidError(path + field, f"must be a whole number, not {value!r}")
        bits = 64 if field in _WIDE else 32
        if not 0 <= value.__index__() < 2**bits:
            raise InvalidError(path + field, f"must be 0 to 2^{bits} - 1, not {value}")


# --- from C ---


def _layout(ctype: str) -> struct.Struct:
    """Return how to unpack a C struct of numbers, as cffi knows it."""
    kinds = {field.offset: field.type.cname for _, field in ffi.typeof(ctype).fields}
    codes = "".join(_CODES[kind] for kind in kinds.values())  # a union's is one
    layout = struct.Struct("=" + codes)
    assert layout.size == ffi.sizeof(ctype), "the struct has no padding"
    return layout


_CODES = {"uint32_t": "I", "uint64_t": "Q"}
_RESULT, _COPY, _PLACE = _layout("odma_result"), _layout("odma_copy"), _layout("odma_place")
_REUSED = _layout("odma_reused")
_new = tuple.__new__  # Place(...) takes twice as long


def results_from(results: Any, ops: Sequence[Op], block_tokens: int) -> list[Result]:
    """Return what C answered to each of `ops`."""
    answered: list[Result] = []
    for op, entry in zip(ops, _entries(_RESULT, results, len(ops)), strict=True):
        outcome, reason, rule, start, length, free, largest, waiting, needed, most, handle, who = (
            entry
        )
        if outcome == _PLACED:
            place = (
                handle,
                start * block_tokens,
                length * block_tokens,
                free,
                largest * block_tokens,
                waiting,
            )
            answered.append(_new(Place, place))
        elif outcome == _FREED:
            answered.append(_NEW_FREED)
        elif outcome == _ALREADY_FREE:
            answered.append(_OLD_FREED)
        else:
            answered.append(
                Refusal(
                    _REASONS[reason],
                    free * block_tokens,
                    largest * block_tokens,
                    waiting * block_tokens,
                    needed,
                    who,
                    _broken_rule(rule, op, most * block_tokens),
                )
            )
    return answered


def copies_from(copies: Any, count: int) -> list[Copy]:
    """Return copies, in tokens as C has them."""
    return [
        _new(Copy, (handle, start, to, tokens, bool(overlaps)))
        for handle, start, to, tokens, overlaps in _entries(_COPY, copies, count)
    ]


def places_from(places: Any, reused: Any, count: int, block_tokens: int) -> list[Place]:
    """Return places in tokens, with what each of them reuses."""
    return [
        _new(
            Place,
            (
                handle,
                start * block_tokens,
                length * block_tokens,
                tokens,
                at * block_tokens,
                shared,
            ),
        )
        for (handle, start, length), (tokens, at, shared, _) in zip(
            _entries(_PLACE, places, count), _entries(_REUSED, reused, count), strict=True
        )
    ]


def _entries(layout: struct.Struct, array: Any, count: int) -> Iterator[tuple[Any, ...]]:
    return layout.iter_unpack(ffi.buffer(array, count * layout.size)) if count else iter(())


def batch_error(rule: int, index: int) -> InvalidError:
    """Return the error for a batch that breaks `rule` at `index`."""
    field, sentence = RULES[rule]
    return InvalidError(f"used[{index}].{field}" if rule in _USED_RULES else field, sentence)


def _broken_rule(rule: int, op: Op, most_tokens: int) -> str:
    if rule == _NO_RULE:
        return ""
    # An empty request id may stand for whatever else C was not shown.
    if rule == lib.ODMA_RULE_REQUEST_ID and isinstance(op, Allocate):
        flaw = _texts(op)
        if isinstance(flaw, _Flaw):
            return ": ".join(flaw)
    sentence = ": ".join(RULES[rule])
    return f"{sentence} ({most_tokens} tokens)" if rule in _TENANT_RULES else sentence
