"""Messages to values and back: Apply and what it shares with the other rpcs.

What one operation may hold is checked where its outcome is decided. Here only that is refused
which makes the whole message senseless. A decode step waits for this code: it makes tuples
without the checks of their classes, and `used`, the longest list, without their names.
"""

from __future__ import annotations

from typing import cast

from odma_service.errors import InvalidError
from odma_service.pool import NAME, NAME_RULE
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.values import (
    Allocate,
    Answer,
    Batch,
    Extend,
    Free,
    Freed,
    Op,
    Place,
    Refusal,
    Result,
    Text,
    Trim,
    Used,
)

_tuple = tuple.__new__  # Extend(...) takes twice as long


def name_from(name: str, field: str = "name") -> str:
    """Return a pool's name, which is also safe as a file name."""
    if not NAME.fullmatch(name):
        raise InvalidError(field, NAME_RULE)
    return name


def ref_from(ref: types.PoolRef) -> tuple[str, int]:
    """Return the name and epoch of the pool that a request is about."""
    if ref.epoch == 0:
        raise InvalidError("pool.epoch", "the epoch that OpenPool answered")
    return name_from(ref.name, "pool.name"), ref.epoch


def batch_from(request: pb.ApplyRequest) -> Batch:
    """Return the batch that an Apply asks for. Raises InvalidError for an empty operation."""
    if request.seq == 0:
        raise InvalidError("seq", "at least 1")
    used = [(u.handle, u.used_tokens, u.pinned) for u in request.used]
    return Batch(
        request.seq,
        request.completed_seq,
        cast("list[Used]", used),
        _ops_from(request),
        request.max_copy_tokens if request.HasField("max_copy_tokens") else None,
        request.pass_refused,
    )


def _ops_from(request: pb.ApplyRequest) -> list[Op]:
    ops: list[Op] = []
    for op in request.ops:
        kind = op.WhichOneof("op")
        if kind == "extend":
            ops.append(extend_from(op.extend))
        elif kind == "free":
            ops.append(free_from(op.free))
        elif kind == "allocate":
            ops.append(allocate_from(op.allocate))
        elif kind == "trim":
            ops.append(_tuple(Trim, (op.trim.handle, op.trim.to_tokens)))
        else:
            raise InvalidError(f"ops[{len(ops)}]", "one of free, trim, extend and allocate")
    return ops


def allocate_from(message: pb.Alloc) -> Allocate:
    """Return what an Alloc asks for."""
    has = message.HasField
    return _tuple(
        Allocate,
        (
            message.request_id,
            message.prompt_tokens,
            message.generated_tokens,
            message.max_total_tokens if has("max_total_tokens") else None,
            message.request_class,
            message.tenant,
            message.overflow_risk if has("overflow_risk") else None,
            message.predicted_output_tokens if has("predicted_output_tokens") else None,
            Text.of(message.text) if has("text") else None,
        ),
    )


def extend_from(message: pb.Extend) -> Extend:
    """Return what an Extend asks for."""
    return _tuple(Extend, (message.handle, message.least_tokens, message.want_tokens))


def free_from(message: pb.Freeing) -> Free:
    """Return what a Freeing asks for; an unknown `end` is the operation's own mistake."""
    return _tuple(Free, (message.handle, max(message.end, 0), message.output_tokens))


def apply_to(answer: Answer) -> pb.ApplyResponse:
    """Return the message of an answer."""
    response = pb.ApplyResponse(
        seq=answer.seq, replayed=answer.replayed, policy_version=answer.policy_version
    )
    add_result, add_copy = response.results.add, response.copies.add
    for result in answer.results:
        if type(result) is Place:
            place = add_result().place
            place.handle, place.start_token, place.length_tokens = result
        else:
            _fill_result(add_result(), result)
    for handle, from_token, to_token, tokens, overlaps in answer.copies:
        add_copy(
            handle=handle,
            from_token=from_token,
            to_token=to_token,
            tokens=tokens,
            overlaps=overlaps,
        )
    response.moved.extend(map(place_to, answer.moved))
    return response


def _fill_result(message: pb.Result, result: Result) -> None:
    if isinstance(result, Refusal):
        message.refusal.CopyFrom(refusal_to(result))
    elif isinstance(result, Freed) and result.already_free:
        message.already_free.SetInParent()
    else:
        message.freed.SetInParent()


def place_to(place: Place) -> types.Place:
    """Return the message of a place."""
    return types.Place(
        handle=place.handle, start_token=place.start_token, length_tokens=place.length_tokens
    )


def refusal_to(refusal: Refusal) -> types.Refusal:
    """Return the message of a refusal."""
    return types.Refusal(
        reason=cast("types.RefusalReason.ValueType", refusal.reason.value),
        free_tokens=refusal.free_tokens,
        largest_run_tokens=refusal.largest_run_tokens,
        awaiting_completion_tokens=refusal.awaiting_completion_tokens,
        copy_tokens_needed=refusal.copy_tokens_needed,
        preempt_handle=refusal.preempt_handle,
        field=refusal.field,
    )
