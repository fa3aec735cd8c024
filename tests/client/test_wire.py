"""What is said over the wire is understood as it was meant."""

from __future__ import annotations

import pytest

from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.values import (
    Allocate,
    Answer,
    Batch,
    Copy,
    End,
    Extend,
    Free,
    Freed,
    Moves,
    Overflow,
    Place,
    PlaneGroup,
    PolicyChange,
    Reason,
    Refusal,
    Start,
    TenantShare,
    Text,
    Trim,
    Used,
)
from odma_service.wire import (
    answer_from,
    answer_to,
    batch_from,
    batch_to,
    change_from,
    change_to,
    planes_from,
    planes_to,
    refusal_from,
)

OPS = [
    Free(2**52, End.HIT_LIMIT, 3),
    Trim(1, 2),
    Extend(1, 2, 3),
    Allocate("r", 5),
    Allocate("s", 5, 6, 7, "class", "tenant", 0.0, 8, Text.of("¿"), bytes(range(32))),
    Free(3, End.PREEMPTED, 4, 5, b"k" * 16),
]


@pytest.mark.parametrize(
    "batch",
    [
        Batch(1, 0, [], []),
        Batch(
            9,
            7,
            [Used(1, 2), Used(3, 4, pinned=True), Used(5, 6, False, 6)],
            OPS,
            0,
            pass_refused=True,
        ),
    ],
)
def test_a_batch_arrives_as_it_was_asked(batch):
    ref = types.PoolRef(name="p", epoch=7)
    request = pb.ApplyRequest.FromString(batch_to(ref, batch).SerializeToString())
    assert request.pool == ref
    assert batch_from(request) == batch


def test_an_answer_arrives_as_it_was_given():
    results = [
        Place(1, 2, 3),
        Place(4, 5, 6, 7),
        Place(4, 5, 6, 7, 0, 7),
        Freed(),
        Freed(already_free=True),
        Refusal(Reason.INVALID, field="end: is required"),
        Refusal(Reason.COPY_BUDGET, 1, 2, 3, 4, 2**52),
    ]
    copies = [Copy(1, 2, 3, 4, overlaps=True), Copy(5, 6, 7, 8, overlaps=False)]
    answer = Answer(9, True, results, copies, [Place(5, 6, 7, 8, 9, 8)], 2)
    response = pb.ApplyResponse.FromString(answer_to(answer).SerializeToString())
    assert answer_from(response) == answer


def test_a_refusal_for_a_reason_of_a_newer_service_is_a_refusal():
    refusal = refusal_from(types.Refusal(reason=99, free_tokens=5))
    assert (refusal.reason, refusal.reason.name, refusal.free_tokens) == (99, "UNKNOWN_99", 5)
    assert refusal.reason not in list(Reason)


@pytest.mark.parametrize(
    "change",
    [
        PolicyChange(),
        PolicyChange("odma", 1, (2, 3), False, 0.0, 0.5, 0.0, 1.5, 0.25, 0),
        PolicyChange(clear_limits=True, tenants=(TenantShare("a", 0.5, 0.75),)),
        PolicyChange(clear_tenants=True),
    ],
)
def test_a_change_of_policy_arrives_as_it_was_asked(change):
    message = types.PolicyChange.FromString(change_to(change).SerializeToString())
    assert change_from(message) == change


def test_planes_arrive_as_they_were_told():
    planes = (PlaneGroup(56, 1024), PlaneGroup(1, 100, 4))
    assert planes_from(planes_to(planes)) == planes


@pytest.mark.parametrize(
    ("ours", "theirs", "prefix"),
    [
        (End, pb.End, "END_"),
        (Reason, types.RefusalReason, "REFUSAL_REASON_"),
        (Moves, types.Moves, "MOVES_"),
        (Start, types.Start, "START_"),
        (Overflow, types.Overflow, "OVERFLOW_"),
    ],
)
def test_both_sides_have_the_same_numbers(ours, theirs, prefix):
    numbers = {prefix + each.name: each.value for each in ours}
    assert dict(theirs.items()) == {f"{prefix}UNSPECIFIED": 0} | numbers
