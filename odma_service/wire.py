"""Values to messages and back, for the service and for its clients.

`_to` makes the message of a value, `_from` the value of a message. A decode step waits for this
code on both sides: it fills messages where they lie, makes tuples without the checks of their
classes, and `used`, the longest list, without their names.

What one operation may hold is checked where its outcome is decided. Only a message that is
senseless as a whole is refused here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import cast

from odma_service.errors import InvalidError, ServiceError
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.values import (
    Allocate,
    Answer,
    Batch,
    Copy,
    Extend,
    Free,
    Freed,
    Op,
    Place,
    PlaneGroup,
    PolicyChange,
    Reason,
    Reconciled,
    Refusal,
    Result,
    TenantShare,
    Text,
    Trim,
    Used,
)

DOMAIN = "odma"
"""Of the ErrorInfo that every error carries."""

_tuple = tuple.__new__  # Extend(...) takes twice as long

# --- what an engine asks ---


def batch_to(ref: types.PoolRef, batch: Batch) -> pb.ApplyRequest:
    """Return the Apply that asks for a batch."""
    request = pb.ApplyRequest(
        pool=ref,
        seq=batch.seq,
        completed_seq=batch.completed_seq,
        max_copy_tokens=batch.max_copy_tokens,
        pass_refused=batch.pass_refused,
    )
    add_used, add_op = request.used.add, request.ops.add
    for handle, used_tokens, pinned, shareable_tokens in batch.used:
        used = add_used()
        used.handle, used.used_tokens = handle, used_tokens
        if pinned:
            used.pinned = True
        if shareable_tokens:
            used.shareable_tokens = shareable_tokens
    for op in batch.ops:
        _fill_op(add_op(), op)
    return request


def batch_from(request: pb.ApplyRequest) -> Batch:
    """Return the batch that an Apply asks for. Raises InvalidError for an empty operation."""
    if request.seq == 0:
        raise InvalidError("seq", "at least 1")
    used = [(u.handle, u.used_tokens, u.pinned, u.shareable_tokens) for u in request.used]
    return Batch(
        request.seq,
        request.completed_seq,
        cast("list[Used]", used),
        _ops_from(request),
        request.max_copy_tokens if request.HasField("max_copy_tokens") else None,
        request.pass_refused,
    )


def op_to(op: Op) -> pb.Op:
    """Return the message of an operation."""
    message = pb.Op()
    _fill_op(message, op)
    return message


def _fill_op(message: pb.Op, op: Op) -> None:
    match op:
        case Extend():
            extend = message.extend
            extend.handle, extend.least_tokens, extend.want_tokens = op
        case Free():
            free, end = message.free, cast("pb.End.ValueType", op.end)
            free.handle, free.end, free.output_tokens = op.handle, end, op.output_tokens
            free.keep_tokens, free.keys = op.keep_tokens, op.keys
        case Allocate():
            for field, value in zip(op._fields, op, strict=True):
                if isinstance(value, Text):
                    message.allocate.text = value.data.decode()
                elif value is not None:
                    setattr(message.allocate, field, value)
        case Trim():
            message.trim.handle, message.trim.to_tokens = op


def _ops_from(request: pb.ApplyRequest) -> list[Op]:
    ops: list[Op] = []
    for op in request.ops:
        kind = op.WhichOneof("op")
        if kind == "extend":
            extend = op.extend  # as extend_from, without its call
            numbers = extend.handle, extend.least_tokens, extend.want_tokens
            ops.append(_tuple(Extend, numbers))
        elif kind == "free":
            ops.append(free_from(op.free))
        elif kind == "allocate":
            ops.append(allocate_from(op.allocate))
        elif kind == "trim":
            trim = op.trim
            ops.append(_tuple(Trim, (trim.handle, trim.to_tokens)))
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
            message.keys,
        ),
    )


def extend_from(message: pb.Extend) -> Extend:
    """Return what an Extend asks for."""
    return _tuple(Extend, (message.handle, message.least_tokens, message.want_tokens))


def free_from(message: pb.Freeing) -> Free:
    """Return what a Freeing asks for; an unknown `end` is the operation's own mistake."""
    return _tuple(
        Free,
        (
            message.handle,
            max(message.end, 0),
            message.output_tokens,
            message.keep_tokens,
            message.keys,
        ),
    )


# --- what it is answered ---


def answer_to(answer: Answer) -> pb.ApplyResponse:
    """Return the message of an answer."""
    response = pb.ApplyResponse(
        seq=answer.seq, replayed=answer.replayed, policy_version=answer.policy_version
    )
    add_result, add_copy = response.results.add, response.copies.add
    for result in answer.results:
        if type(result) is Place:
            message = add_result().place
            message.handle, message.start_token, message.length_tokens, reused, _, shared = result
            if reused or shared:
                _fill_place(message, result)
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
    for place in answer.moved:
        _fill_place(response.moved.add(), place)
    return response


def answer_from(response: pb.ApplyResponse) -> Answer:
    """Return what an Apply was answered. Raises ServiceError for an outcome unknown here."""
    return Answer(
        response.seq,
        response.replayed,
        list(map(_result_from, response.results)),
        [
            _tuple(Copy, (c.handle, c.from_token, c.to_token, c.tokens, c.overlaps))
            for c in response.copies
        ],
        list(map(place_from, response.moved)),
        response.policy_version,
    )


def _fill_result(message: pb.Result, result: Result) -> None:
    if isinstance(result, Refusal):
        message.refusal.CopyFrom(refusal_to(result))
    elif isinstance(result, Freed) and result.already_free:
        message.already_free.SetInParent()
    else:
        message.freed.SetInParent()


def _result_from(message: pb.Result) -> Result:
    outcome = message.WhichOneof("outcome")
    if outcome == "place":
        return place_from(message.place)
    if outcome == "refusal":
        return refusal_from(message.refusal)
    if outcome in ("freed", "already_free"):
        return Freed(outcome == "already_free")
    raise ServiceError("an operation has an outcome that this client does not know")


def place_to(place: Place) -> types.Place:
    """Return the message of a place."""
    return types.Place(**place._asdict())


def _fill_place(message: types.Place, place: Place) -> None:
    message.handle, message.start_token, message.length_tokens, reused, at, shared = place
    if reused or shared:
        message.reused_tokens = reused
        message.shared_start_token, message.shared_tokens = at, shared


def place_from(message: types.Place) -> Place:
    """Return the place that a message tells."""
    return _tuple(
        Place,
        (
            message.handle,
            message.start_token,
            message.length_tokens,
            message.reused_tokens,
            message.shared_start_token,
            message.shared_tokens,
        ),
    )


def refusal_to(refusal: Refusal) -> types.Refusal:
    """Return the message of a refusal."""
    return types.Refusal(**refusal._asdict())


def refusal_from(message: types.Refusal) -> Refusal:
    """Return the refusal that a message tells."""
    return Refusal(
        Reason(message.reason),
        message.free_tokens,
        message.largest_run_tokens,
        message.awaiting_completion_tokens,
        message.copy_tokens_needed,
        message.preempt_handle,
        message.field,
    )


def reconciled_from(response: pb.ReconcileResponse) -> Reconciled:
    """Return what a Reconcile was answered."""
    return Reconciled(
        list(map(place_from, response.kept)),
        list(response.unknown),
        list(response.freed),
        response.last_seq,
    )


# --- pools and policies ---


def planes_to(planes: Iterable[PlaneGroup]) -> list[types.PlaneGroup]:
    """Return the messages of planes."""
    return [types.PlaneGroup(**asdict(group)) for group in planes]


def planes_from(messages: Iterable[types.PlaneGroup]) -> tuple[PlaneGroup, ...]:
    """Return the planes that messages tell."""
    return tuple(PlaneGroup(m.count, m.bytes_per_token, m.alignment_bytes or 1) for m in messages)


def tenants_to(tenants: Iterable[TenantShare]) -> list[types.TenantShare]:
    """Return the messages of tenants' shares."""
    return [types.TenantShare(**tenant._asdict()) for tenant in tenants]


def tenant_from(message: types.TenantShare) -> TenantShare:
    """Return the shares that a message tells."""
    maximum = message.maximum_share if message.HasField("maximum_share") else 1.0
    return TenantShare(message.name, message.guaranteed_share, maximum)


def change_to(change: PolicyChange) -> types.PolicyChange:
    """Return the message of a change of policy."""
    fields = {**change._asdict(), "tenants": tenants_to(change.tenants)}
    return types.PolicyChange(**fields)


def change_from(message: types.PolicyChange) -> PolicyChange:
    """Return the change of policy that a message asks for."""
    has = message.HasField
    return PolicyChange(
        name=message.name,
        step_tokens=message.step_tokens if has("step_tokens") else None,
        limits_tokens=tuple(message.limits_tokens),
        clear_limits=message.clear_limits,
        overflow_risk=message.overflow_risk if has("overflow_risk") else None,
        safety_share=message.safety_share if has("safety_share") else None,
        unsure_ratio=message.unsure_ratio if has("unsure_ratio") else None,
        growth=message.growth if has("growth") else None,
        tenant_share=message.tenant_share if has("tenant_share") else None,
        max_copy_tokens=message.max_copy_tokens if has("max_copy_tokens") else None,
        tenants=tuple(map(tenant_from, message.tenants)),
        clear_tenants=message.clear_tenants,
    )
