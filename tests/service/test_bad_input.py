"""Whatever an engine sends that is wrong: the answer names it, and the books are as before."""

from __future__ import annotations

import math

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from servers import CAPACITY_TOKENS, GEOMETRY, books, open_pool

from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.rpc.v1.memory_service_pb2_grpc import MemoryServiceStub
from odma_service.rpc.v1.pool_service_pb2_grpc import PoolServiceStub
from odma_service.values import Allocate, End, Extend, Free, PolicyChange, Trim
from odma_service.wire import op_to

Code = grpc.StatusCode
HUGE = 2**64 - 1
HUGE32 = 2**32 - 1
NAN = math.nan


@pytest.fixture(scope="module")
def memory(server):
    with grpc.insecure_channel(server.target) as channel:
        yield MemoryServiceStub(channel)


@pytest.fixture(scope="module")
def pools(server):
    with grpc.insecure_channel(server.target) as channel:
        yield PoolServiceStub(channel)


@pytest.fixture
def engine(service, name):
    """Return a pool with regions a, b and c of 112 tokens, and a dead one; last seq 2."""
    engine = open_pool(service, name, policy=PolicyChange(name="static"))
    operations = [Allocate(letter, 10, max_total_tokens=100) for letter in "abcd"]
    places = engine.apply(ops=operations).results
    handles = {letter: place.handle for letter, place in zip("abcd", places, strict=True)}
    engine.last = pb.ApplyRequest(
        pool=engine.numbered(),
        seq=2,
        completed_seq=1,
        used=[pb.Used(handle=handles[letter], used_tokens=50) for letter in "abc"],
        ops=[op_to(Free(handles["d"], End.FINISHED, 5))],
    )
    engine._client.memory.Apply(engine.last)
    engine.handles = handles | {"never": handles["d"] + 2**30, "zero": 0, "huge": HUGE}
    return engine


def fails(service, name, method, request, code, field=None, reason=None):
    """Make a call that must fail; look whether it says why and changed nothing."""
    before = books(service, name), names_of(service)
    with pytest.raises(grpc.RpcError) as caught:
        method(request)
    assert (books(service, name), names_of(service)) == before
    error = caught.value
    assert error.code() == code, error.details()
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    assert info.domain == "odma"
    if reason is not None:
        assert info.reason == reason
    if field is not None:
        request = error_details_pb2.BadRequest()
        assert any(detail.Unpack(request) for detail in status.details), error.details()
        [violation] = request.field_violations
        assert violation.field == field
        assert violation.description
        assert field in error.details()
    return error


def names_of(service):
    return [summary.pool.name for summary in service.list_pools().pools]


# --- the pool that a call names ---

REFERENCES = {
    "missing": (lambda ref: ref.Clear(), Code.INVALID_ARGUMENT, "pool.epoch"),
    "name missing": (lambda ref: ref.ClearField("name"), Code.INVALID_ARGUMENT, "pool.name"),
    "name with a path": (lambda ref: set_name(ref, "../x"), Code.INVALID_ARGUMENT, "pool.name"),
    "name with a dot": (lambda ref: set_name(ref, ".x"), Code.INVALID_ARGUMENT, "pool.name"),
    "name too long": (lambda ref: set_name(ref, "x" * 65), Code.INVALID_ARGUMENT, "pool.name"),
    "name not ASCII": (lambda ref: set_name(ref, "é"), Code.INVALID_ARGUMENT, "pool.name"),
    "name with NUL": (lambda ref: set_name(ref, "x\0"), Code.INVALID_ARGUMENT, "pool.name"),
    "name with newline": (lambda ref: set_name(ref, "x\n"), Code.INVALID_ARGUMENT, "pool.name"),
    "name unknown": (lambda ref: set_name(ref, "nobody"), Code.NOT_FOUND, None),
    "epoch missing": (lambda ref: ref.ClearField("epoch"), Code.INVALID_ARGUMENT, "pool.epoch"),
    "epoch stale": (lambda ref: set_epoch(ref, ref.epoch - 1), Code.FAILED_PRECONDITION, None),
    "epoch to come": (lambda ref: set_epoch(ref, ref.epoch + 1), Code.FAILED_PRECONDITION, None),
    "epoch huge": (lambda ref: set_epoch(ref, HUGE), Code.FAILED_PRECONDITION, None),
}

CALLS = {
    "ClosePool": pb.ClosePoolRequest(),
    "Apply": pb.ApplyRequest(seq=3),
    "Allocate": pb.AllocateRequest(allocate=pb.Alloc(request_id="r", prompt_tokens=1)),
    "Extend": pb.ExtendRequest(extend=pb.Extend(handle=1, least_tokens=1)),
    "Free": pb.FreeRequest(free=pb.Freeing(handle=1, end=pb.END_FINISHED)),
    "Reconcile": pb.ReconcileRequest(),
    "Recalibrate": pb.RecalibrateRequest(),
    "SetPolicy": pb.SetPolicyRequest(policy=types.PolicyChange(growth=2)),
}


def set_name(ref, name):
    ref.name = name


def set_epoch(ref, epoch):
    ref.epoch = epoch


@pytest.mark.parametrize("case", REFERENCES)
@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_pool(service, memory, engine, call, case):
    spoil, code, field = REFERENCES[case]
    request = type(CALLS[call])()
    request.CopyFrom(CALLS[call])
    request.pool.CopyFrom(engine.numbered())
    spoil(request.pool)
    fails(service, engine.ref.name, getattr(memory, call), request, code, field)


# --- Apply: the batch ---


def with_ops(*ops):
    return lambda request, _: request.ops.extend(ops)


def with_used(*entries):
    """Return a change that lists regions by letter, with so many tokens."""

    def change(request, handles):
        request.used.extend(
            pb.Used(handle=handles[letter], used_tokens=tokens) for letter, tokens in entries
        )

    return change


def with_fields(**fields):
    def change(request, _):
        for field, value in fields.items():
            setattr(request, field, value)

    return change


INVALID_BATCHES = {
    "seq zero": (with_fields(seq=0), "seq"),
    "completed ahead": (with_fields(completed_seq=3), "completed_seq"),
    "completed huge": (with_fields(completed_seq=HUGE), "completed_seq"),
    "completed falls": (with_fields(completed_seq=0), "completed_seq"),
    "an empty operation": (with_ops(pb.Op()), "ops[0]"),
    "a later empty operation": (with_ops(op_to(Trim(1, 1)), pb.Op()), "ops[1]"),
    "too many operations": (with_ops(*[op_to(Trim(1, 1))] * 1025), "ops"),
    "too many used": (with_used(*[("a", 1)] * 1025), "used"),
    "used dead": (with_used(("a", 1), ("d", 1)), "used[1].handle"),
    "used never issued": (with_used(("never", 1)), "used[0].handle"),
    "used zero handle": (with_used(("zero", 1)), "used[0].handle"),
    "used huge handle": (with_used(("huge", 1)), "used[0].handle"),
    "used twice": (with_used(("a", 1), ("b", 1), ("a", 1)), "used[2].handle"),
    "used beyond its length": (with_used(("a", 113)), "used[0].used_tokens"),
    "used huge": (with_used(("a", HUGE32)), "used[0].used_tokens"),
}


@pytest.mark.parametrize("case", INVALID_BATCHES)
def test_an_invalid_batch(service, memory, engine, case):
    change, field = INVALID_BATCHES[case]
    request = pb.ApplyRequest(pool=engine.numbered(), seq=3, completed_seq=1)
    change(request, engine.handles)
    fails(service, engine.ref.name, memory.Apply, request, Code.INVALID_ARGUMENT, field)
    good = pb.ApplyRequest(pool=engine.numbered(), seq=3, completed_seq=2)
    assert not memory.Apply(good).replayed


@pytest.mark.parametrize(
    ("seq", "code", "reason"),
    [
        (1, Code.OUT_OF_RANGE, "SEQ_OLD"),
        (4, Code.FAILED_PRECONDITION, "SEQ_GAP"),
        (2**53, Code.FAILED_PRECONDITION, "SEQ_GAP"),
        (HUGE, Code.FAILED_PRECONDITION, "SEQ_GAP"),
    ],
)
def test_a_wrong_seq(service, memory, engine, seq, code, reason):
    request = pb.ApplyRequest(pool=engine.numbered(), seq=seq, completed_seq=1)
    error = fails(service, engine.ref.name, memory.Apply, request, code, None, reason)
    assert "the next is 3" in error.details()


CHANGES = {
    "a used less": lambda request: request.used.pop(),
    "used tokens": lambda request: setattr(request.used[0], "used_tokens", 51),
    "a pin": lambda request: setattr(request.used[0], "pinned", True),
    "an operation less": lambda request: request.ops.pop(),
    "an operation more": lambda request: request.ops.append(op_to(Allocate("x", 1))),
    "how it ended": lambda request: setattr(request.ops[0].free, "end", pb.END_ABORTED),
    "completed_seq": lambda request: setattr(request, "completed_seq", 0),
    "the copy budget": lambda request: setattr(request, "max_copy_tokens", 0),
    "pass_refused": lambda request: setattr(request, "pass_refused", True),
}


@pytest.mark.parametrize("case", CHANGES)
def test_the_last_seq_with_another_body(service, memory, engine, case):
    request = pb.ApplyRequest()
    request.CopyFrom(engine.last)
    assert memory.Apply(request).replayed
    CHANGES[case](request)
    fails(service, engine.ref.name, memory.Apply, request, Code.ALREADY_EXISTS, None, "SEQ_CHANGED")
    assert memory.Apply(engine.last).replayed


@pytest.mark.parametrize("field", ["text", "request_class", "tenant", "overflow_risk"])
def test_the_last_seq_with_another_field_of_an_allocate(memory, engine, field):
    usual = {"text": "prompt", "request_class": "chat", "tenant": "t", "overflow_risk": 0.25}
    changed = usual | {field: 0.5 if field == "overflow_risk" else "other"}
    first, other = (
        pb.ApplyRequest(
            pool=engine.numbered(), seq=3, completed_seq=1, ops=[op_to(Allocate("x", 10, **fields))]
        )
        for fields in (usual, changed)
    )
    memory.Apply(first)
    with pytest.raises(grpc.RpcError) as caught:
        memory.Apply(other)
    assert caught.value.code() == Code.ALREADY_EXISTS


# --- one operation, in a batch and alone ---

NEVER = Code.NOT_FOUND, "NOT_FOUND", "handle"


def invalid(field):
    return Code.INVALID_ARGUMENT, "INVALID", field


def alloc(**fields):
    """Return an operation that allocates 10 tokens for "x", but for `fields`."""
    return lambda handles: Allocate("x", 10)._replace(**fields)


OPERATIONS = {
    "allocate id missing": (alloc(request_id=""), *invalid("request_id")),
    "allocate id too long": (alloc(request_id="x" * 65), *invalid("request_id")),
    "allocate id too many bytes": (alloc(request_id="é" * 33), *invalid("request_id")),
    "allocate id with NUL": (alloc(request_id="x\0y"), *invalid("request_id")),
    "allocate id lives": (alloc(request_id="a"), *invalid("request_id")),
    "allocate class too long": (alloc(request_class="x" * 33), *invalid("request_class")),
    "allocate class with NUL": (alloc(request_class="\0"), *invalid("request_class")),
    "allocate tenant too long": (alloc(tenant="x" * 33), *invalid("tenant")),
    "allocate text too long": (alloc(text="x" * 16_385), *invalid("text")),
    "allocate prompt missing": (alloc(prompt_tokens=0), *invalid("prompt_tokens")),
    "allocate prompt huge": (alloc(prompt_tokens=HUGE32), *invalid("prompt_tokens")),
    "allocate prompt above maximum": (
        alloc(prompt_tokens=11, max_total_tokens=10),
        *invalid("prompt_tokens"),
    ),
    "allocate generated huge": (alloc(generated_tokens=HUGE32), *invalid("prompt_tokens")),
    "allocate sum wraps around": (
        alloc(prompt_tokens=2**31, generated_tokens=2**31 + 10),
        *invalid("prompt_tokens"),
    ),
    "allocate maximum zero": (alloc(max_total_tokens=0), *invalid("max_total_tokens")),
    "allocate can never fit": (
        alloc(max_total_tokens=CAPACITY_TOKENS + 1),
        *invalid("max_total_tokens"),
    ),
    "allocate maximum huge": (alloc(max_total_tokens=HUGE32), *invalid("max_total_tokens")),
    "allocate risk NaN": (alloc(overflow_risk=NAN), *invalid("overflow_risk")),
    "allocate risk negative": (alloc(overflow_risk=-0.1), *invalid("overflow_risk")),
    "allocate risk tiny negative": (alloc(overflow_risk=-1e-300), *invalid("overflow_risk")),
    "allocate risk above one": (alloc(overflow_risk=1.001), *invalid("overflow_risk")),
    "allocate risk infinite": (alloc(overflow_risk=math.inf), *invalid("overflow_risk")),
    "allocate risk huge": (alloc(overflow_risk=1e308), *invalid("overflow_risk")),
    "allocate guess zero": (
        alloc(predicted_output_tokens=0),
        *invalid("predicted_output_tokens"),
    ),
    "extend dead": (lambda h: Extend(h["d"], 20), *NEVER),
    "extend never issued": (lambda h: Extend(h["never"], 20), *NEVER),
    "extend zero handle": (lambda h: Extend(0, 20), *NEVER),
    "extend huge handle": (lambda h: Extend(HUGE, 20), *NEVER),
    "extend least missing": (lambda h: Extend(h["a"], 0), *invalid("least_tokens")),
    "extend beyond the maximum": (lambda h: Extend(h["a"], 113), *invalid("least_tokens")),
    "extend least huge": (lambda h: Extend(h["a"], HUGE32), *invalid("least_tokens")),
    "extend want below least": (lambda h: Extend(h["a"], 50, 49), *invalid("want_tokens")),
    "extend want huge": (lambda h: Extend(h["a"], 50, HUGE32), *invalid("want_tokens")),
    "free never issued": (lambda h: Free(h["never"], End.FINISHED), *NEVER),
    "free zero handle": (lambda h: Free(0, End.FINISHED), *NEVER),
    "free huge handle": (lambda h: Free(HUGE, End.FINISHED), *NEVER),
    "free end missing": (lambda h: Free(h["a"], 0), *invalid("end")),
    "free end unknown": (lambda h: Free(h["a"], 99), *invalid("end")),
    "free end negative": (lambda h: Free(h["a"], -1), *invalid("end")),
    "free output huge": (lambda h: Free(h["a"], 1, 2**24 + 1), *invalid("output_tokens")),
    "trim dead": (lambda h: Trim(h["d"], 20), *NEVER),
    "trim never issued": (lambda h: Trim(h["never"], 20), *NEVER),
    "trim to nothing": (lambda h: Trim(h["a"], 0), *invalid("to_tokens")),
    "trim to more": (lambda h: Trim(h["a"], 113), *invalid("to_tokens")),
    "trim huge": (lambda h: Trim(h["a"], HUGE32), *invalid("to_tokens")),
    "trim below what is used": (lambda h: Trim(h["a"], 49), *invalid("to_tokens")),
}


@pytest.mark.parametrize("case", OPERATIONS)
def test_a_bad_operation_of_a_batch(service, memory, engine, case):
    make, _, reason, field = OPERATIONS[case]
    regions = service.list_regions(engine.ref.name)
    request = pb.ApplyRequest(
        pool=engine.numbered(),
        seq=3,
        completed_seq=1,
        used=[pb.Used(handle=engine.handles[letter], used_tokens=50) for letter in "abc"],
        ops=[op_to(make(engine.handles)), op_to(Allocate("y", 10, max_total_tokens=16))],
        pass_refused=True,
    )
    answer = memory.Apply(request)
    refusal = answer.results[0].refusal
    assert types.RefusalReason.Name(refusal.reason) == f"REFUSAL_REASON_{reason}"
    assert refusal.field.startswith(f"{field}: ")
    assert answer.results[1].HasField("place")
    left = [r for r in service.list_regions(engine.ref.name) if r.request_id != "y"]
    assert left == regions
    again = memory.Apply(request)
    assert again.replayed
    assert again.results == answer.results


@pytest.mark.parametrize("case", [case for case in OPERATIONS if not case.startswith("trim")])
def test_a_bad_operation_alone(service, memory, engine, case):
    make, code, _, field = OPERATIONS[case]
    operation = op_to(make(engine.handles))
    kind = operation.WhichOneof("op")
    send, request = {
        "allocate": (memory.Allocate, pb.AllocateRequest(allocate=operation.allocate)),
        "extend": (memory.Extend, pb.ExtendRequest(extend=operation.extend)),
        "free": (memory.Free, pb.FreeRequest(free=operation.free)),
    }[kind]
    request.pool.CopyFrom(engine.numbered())
    named = f"{kind}.{field}" if code == Code.INVALID_ARGUMENT else None
    fails(service, engine.ref.name, send, request, code, named)


@pytest.mark.parametrize(
    ("call", "request_type", "field"),
    [
        ("Allocate", pb.AllocateRequest, "allocate"),
        ("Extend", pb.ExtendRequest, "extend"),
        ("Free", pb.FreeRequest, "free"),
        ("SetPolicy", pb.SetPolicyRequest, "policy"),
    ],
)
def test_a_call_without_its_operation(service, memory, engine, call, request_type, field):
    request = request_type(pool=engine.numbered())
    fails(service, engine.ref.name, getattr(memory, call), request, Code.INVALID_ARGUMENT, field)


def test_what_does_not_fit_now(service, memory, engine):
    request = pb.AllocateRequest(
        pool=engine.numbered(), allocate=pb.Alloc(request_id="x", prompt_tokens=4000)
    )
    before = service.list_regions(engine.ref.name)
    with pytest.raises(grpc.RpcError) as caught:
        memory.Allocate(request)
    assert caught.value.code() == Code.RESOURCE_EXHAUSTED
    assert service.list_regions(engine.ref.name) == before  # the refusal is counted


# --- OpenPool ---

GROUP = {"count": 2, "bytes_per_token": 64}


def planes(*groups, **fields):
    listed = [types.PlaneGroup(**GROUP | group) for group in groups or [fields]]
    return {"geometry": types.Geometry(planes=listed)}


def model(text, **fields):
    return {"geometry": None, "model": types.ModelConfig(config_json=text, **fields)}


CONFIG = (
    '{"num_hidden_layers": %s, "num_attention_heads": 8, "num_key_value_heads": 4,'
    ' "hidden_size": 64, "torch_dtype": "bfloat16"}'
)

BAD_OPENINGS = {
    "open_id missing": ({"open_id": ""}, "open_id"),
    "open_id too long": ({"open_id": "x" * 65}, "open_id"),
    "name missing": ({"name": ""}, "name"),
    "name too long": ({"name": "x" * 65}, "name"),
    "name with a slash": ({"name": "a/b"}, "name"),
    "name is a directory": ({"name": ".."}, "name"),
    "name with a space": ({"name": "a b"}, "name"),
    "no layout": ({"geometry": None}, "geometry"),
    "no planes": ({"geometry": types.Geometry()}, "geometry.planes"),
    "too many groups": (planes(*[{"count": 1}] * 65), "geometry.planes"),
    "no count": (planes(count=0), "geometry.planes[0].count"),
    "count huge": (planes({}, {"count": HUGE32}), "geometry.planes[1].count"),
    "too many planes": (planes(*[{"count": 4096}] * 2), "geometry.planes"),
    "no bytes": (planes(bytes_per_token=0), "geometry.planes[0].bytes_per_token"),
    "bytes huge": (planes(bytes_per_token=2**24 + 1), "geometry.planes[0].bytes_per_token"),
    "odd alignment": (planes(alignment_bytes=3), "geometry.planes[0].alignment_bytes"),
    "alignment huge": (planes(alignment_bytes=2**21), "geometry.planes[0].alignment_bytes"),
    "unaligned blocks": (planes(alignment_bytes=2048), "geometry.planes[0].alignment_bytes"),
    "config empty": (model(""), "model.config_json"),
    "config not JSON": (model("{"), "model.config_json"),
    "config no object": (model("[]"), "model.config_json"),
    "config nested deeply": (model("[" * 30_000), "model.config_json"),
    "config of blanks": (model(" " * 4_000_000), "model.config_json"),
    "config without layers": (model("{}"), "model.config_json.torch_dtype"),
    "config layers negative": (model(CONFIG % -1), "model.config_json.num_hidden_layers"),
    "config layers huge": (model(CONFIG % 10**9), "model.config_json.num_hidden_layers"),
    "config layers text": (model(CONFIG % '"8"'), "model.config_json.num_hidden_layers"),
    "config layers fraction": (model(CONFIG % 1.5), "model.config_json.num_hidden_layers"),
    "ranks uneven": (model(CONFIG % 2, tensor_parallel=3), "model.tensor_parallel"),
    "ranks huge": (model(CONFIG % 2, tensor_parallel=HUGE32), "model.tensor_parallel"),
    "key not understood": (
        model((CONFIG % 2)[:-1] + ', "num_loops": 2}'),
        "model.config_json.num_loops",
    ),
    "pipeline uneven": (model(CONFIG % 3, pipeline_parallel=2), "model.pipeline_parallel"),
    "pipeline huge": (model(CONFIG % 2, pipeline_parallel=HUGE32), "model.pipeline_parallel"),
    "pipeline rank too high": (model(CONFIG % 2, pipeline_rank=1), "model.pipeline_rank"),
    "pipeline layers too many": (
        model(CONFIG % 2, pipeline_layers=[1, 2]),
        "model.pipeline_layers",
    ),
    "no prediction layers": (model(CONFIG % 2, mtp=True), "model.mtp"),
    "element huge": (model(CONFIG % 2, element_bytes=17), "model.element_bytes"),
    "device unknown": ({"device": types.Device(preset="tpu")}, "device.preset"),
    "bandwidth zero": (
        {"device": types.Device(bandwidth_bytes_per_second=0)},
        "device.bandwidth_bytes_per_second",
    ),
    "bandwidth negative": (
        {"device": types.Device(bandwidth_bytes_per_second=-1)},
        "device.bandwidth_bytes_per_second",
    ),
    "bandwidth NaN": (
        {"device": types.Device(bandwidth_bytes_per_second=NAN)},
        "device.bandwidth_bytes_per_second",
    ),
    "descriptor negative": (
        {"device": types.Device(descriptor_seconds=-1)},
        "device.descriptor_seconds",
    ),
    "descriptor NaN": (
        {"device": types.Device(descriptor_seconds=NAN)},
        "device.descriptor_seconds",
    ),
    "descriptor infinite": (
        {"device": types.Device(descriptor_seconds=math.inf)},
        "device.descriptor_seconds",
    ),
    "no capacity": ({"capacity_tokens": None}, "capacity_tokens"),
    "capacity zero": ({"capacity_tokens": 0}, "capacity_tokens"),
    "capacity below a block": ({"capacity_tokens": 15}, "capacity_tokens"),
    "capacity huge": ({"capacity_tokens": 2**28 + 16}, "capacity_tokens"),
    "too many blocks": ({"capacity_tokens": 2**25, "block_tokens": 1}, "capacity_tokens"),
    "no bytes of capacity": (
        {"capacity_tokens": None, "capacity_bytes": 0},
        "capacity_bytes",
    ),
    "bytes below a block": (
        {"capacity_tokens": None, "capacity_bytes": 16 * 128 - 1},
        "capacity_bytes",
    ),
    "bytes of capacity huge": (
        {"capacity_tokens": None, "capacity_bytes": HUGE},
        "capacity_bytes",
    ),
    "model length huge": ({"model_length_tokens": 2**24 + 1}, "model_length_tokens"),
    "odd block": ({"block_tokens": 24}, "block_tokens"),
    "block huge": ({"block_tokens": 2048}, "block_tokens"),
    "ttl huge": ({"ttl_seconds": 86_401}, "ttl_seconds"),
    "retention below ttl": ({"retention_seconds": 59}, "retention_seconds"),
    "retention huge": ({"retention_seconds": 2_592_001}, "retention_seconds"),
    "moves missing": ({"moves": types.MOVES_UNSPECIFIED}, "moves"),
    "moves unknown": ({"moves": 99}, "moves"),
    "too many regions": ({"max_regions": 65_537}, "max_regions"),
}

BAD_POLICIES = {
    "unknown": ({"name": "best"}, "name"),
    "step zero": ({"step_tokens": 0}, "step_tokens"),
    "step huge": ({"step_tokens": 2**20 + 1}, "step_tokens"),
    "limit zero": ({"limits_tokens": [0, 1]}, "limits_tokens"),
    "limits equal": ({"limits_tokens": [5, 5]}, "limits_tokens"),
    "limits falling": ({"limits_tokens": [5, 4]}, "limits_tokens"),
    "limit huge": ({"limits_tokens": [2**28 + 1]}, "limits_tokens"),
    "too many limits": ({"limits_tokens": range(1, 18)}, "limits_tokens"),
    "limits and none": ({"limits_tokens": [5], "clear_limits": True}, "clear_limits"),
    "risk negative": ({"overflow_risk": -0.1}, "overflow_risk"),
    "risk NaN": ({"overflow_risk": NAN}, "overflow_risk"),
    "share negative": ({"safety_share": -0.1}, "safety_share"),
    "share above": ({"safety_share": 0.91}, "safety_share"),
    "share NaN": ({"safety_share": NAN}, "safety_share"),
    "ratio below one": ({"unsure_ratio": 0.5}, "unsure_ratio"),
    "ratio negative": ({"unsure_ratio": -1}, "unsure_ratio"),
    "ratio NaN": ({"unsure_ratio": NAN}, "unsure_ratio"),
    "ratio infinite": ({"unsure_ratio": math.inf}, "unsure_ratio"),
    "growth below one": ({"growth": 0.9}, "growth"),
    "growth above four": ({"growth": 4.1}, "growth"),
    "growth NaN": ({"growth": NAN}, "growth"),
    "tenant share zero": ({"tenant_share": 0}, "tenant_share"),
    "tenant share above": ({"tenant_share": 1.1}, "tenant_share"),
    "tenant share NaN": ({"tenant_share": NAN}, "tenant_share"),
    "tenant without name": ({"tenants": [{}]}, "tenants[0].name"),
    "tenant named twice": ({"tenants": [{"name": "t"}, {"name": "t"}]}, "tenants[1].name"),
    "guarantee NaN": (
        {"tenants": [{"name": "t", "guaranteed_share": NAN}]},
        "tenants[0].guaranteed_share",
    ),
    "guarantee above maximum": (
        {"tenants": [{"name": "t", "guaranteed_share": 0.6, "maximum_share": 0.5}]},
        "tenants[0].guaranteed_share",
    ),
    "maximum zero": (
        {"tenants": [{"name": "t", "maximum_share": 0}]},
        "tenants[0].maximum_share",
    ),
    "too much guaranteed": (
        {"safety_share": 0.1, "tenants": [{"name": "t", "guaranteed_share": 0.91}]},
        "tenants",
    ),
    "too many tenants": ({"tenants": [{"name": str(i)} for i in range(17)]}, "tenants"),
    "tenants and none": ({"tenants": [{"name": "t"}], "clear_tenants": True}, "clear_tenants"),
}


def opening(name, fields):
    usual = {
        "name": name,
        "open_id": "another",
        "geometry": GEOMETRY,
        "capacity_tokens": CAPACITY_TOKENS,
        "moves": types.MOVES_ANY,
        "take_over": True,
    }
    return pb.OpenPoolRequest(**usual | fields)


@pytest.mark.parametrize("case", BAD_OPENINGS)
def test_a_bad_opening_takes_nothing_over(service, memory, engine, case):
    fields, field = BAD_OPENINGS[case]
    request = opening(engine.ref.name, fields)
    fails(service, engine.ref.name, memory.OpenPool, request, Code.INVALID_ARGUMENT, field)


@pytest.mark.parametrize("case", BAD_OPENINGS)
def test_a_bad_opening_makes_no_pool(service, memory, pool, name, case):
    fields, field = BAD_OPENINGS[case]
    request = opening(f"{name}-new", fields)
    fails(service, name, memory.OpenPool, request, Code.INVALID_ARGUMENT, field)


@pytest.mark.parametrize("case", BAD_POLICIES)
def test_a_bad_policy_at_opening(service, memory, engine, case):
    fields, field = BAD_POLICIES[case]
    request = opening(engine.ref.name, {"policy": types.PolicyChange(**fields)})
    fails(
        service, engine.ref.name, memory.OpenPool, request, Code.INVALID_ARGUMENT, f"policy.{field}"
    )


# --- the other calls ---


@pytest.mark.parametrize("case", BAD_POLICIES)
def test_a_bad_policy(service, memory, engine, case):
    fields, field = BAD_POLICIES[case]
    request = pb.SetPolicyRequest(pool=engine.numbered(), policy=types.PolicyChange(**fields))
    fails(
        service,
        engine.ref.name,
        memory.SetPolicy,
        request,
        Code.INVALID_ARGUMENT,
        f"policy.{field}",
    )


@pytest.mark.parametrize("version", [0, 1, HUGE32])
@pytest.mark.parametrize("call", ["SetPolicy", "Recalibrate"])
def test_another_version_than_expected(service, memory, engine, call, version):
    request = {
        "SetPolicy": pb.SetPolicyRequest(policy=types.PolicyChange(growth=2)),
        "Recalibrate": pb.RecalibrateRequest(),
    }[call]
    request.pool.CopyFrom(engine.numbered())
    request.expected_version = version
    fails(
        service,
        engine.ref.name,
        getattr(memory, call),
        request,
        Code.FAILED_PRECONDITION,
        None,
        "VERSION",
    )


@pytest.mark.parametrize("limits", [17, HUGE32])
def test_too_many_limits_to_find(service, memory, engine, limits):
    request = pb.RecalibrateRequest(pool=engine.numbered(), limits=limits)
    fails(service, engine.ref.name, memory.Recalibrate, request, Code.INVALID_ARGUMENT, "limits")


def test_nothing_to_recalibrate_from(service, memory, engine):
    request = pb.RecalibrateRequest(pool=engine.numbered())
    fails(
        service,
        engine.ref.name,
        memory.Recalibrate,
        request,
        Code.FAILED_PRECONDITION,
        None,
        "NOTHING_LEARNT",
    )


def test_too_many_handles_to_keep(service, memory, engine):
    request = pb.ReconcileRequest(pool=engine.numbered(), handles=range(1025))
    fails(service, engine.ref.name, memory.Reconcile, request, Code.INVALID_ARGUMENT, "handles")


@pytest.mark.parametrize("bad", ["", "a/b", "..", "x" * 65, "a b"])
@pytest.mark.parametrize("call", ["GetPool", "ListRegions"])
def test_a_bad_name_to_look_at(service, pools, engine, call, bad):
    request = {"GetPool": pool_pb.GetPoolRequest, "ListRegions": pool_pb.ListRegionsRequest}[call]
    fails(
        service,
        engine.ref.name,
        getattr(pools, call),
        request(name=bad),
        Code.INVALID_ARGUMENT,
        "name",
    )


@pytest.mark.parametrize("size", [10_001, HUGE32])
def test_a_page_too_large(service, pools, engine, size):
    request = pool_pb.ListRegionsRequest(name=engine.ref.name, page_size=size)
    fails(service, engine.ref.name, pools.ListRegions, request, Code.INVALID_ARGUMENT, "page_size")


def test_a_page_beyond_the_end_is_empty(pools, engine):
    request = pool_pb.ListRegionsRequest(name=engine.ref.name, from_token=HUGE32)
    assert pools.ListRegions(request) == pool_pb.ListRegionsResponse()


# --- messages ---


@pytest.mark.parametrize(
    ("message", "code", "reason"),
    [
        (b"\xff" * 100, Code.INVALID_ARGUMENT, "INVALID"),
        (b"\x0a\x03\x0a\x01\xff", Code.INVALID_ARGUMENT, "INVALID"),
        (b"\x32\x00" * (2 * 2**20 + 1), Code.RESOURCE_EXHAUSTED, "MESSAGE_SIZE"),  # 4 MiB + 2
        (b"\x32\x00" * (4 * 2**20 + 1), Code.RESOURCE_EXHAUSTED, None),  # gRPC's own answer
    ],
    ids=["garbage", "not UTF-8", "too large", "far too large"],
)
def test_a_message_that_is_none(service, server, engine, message, code, reason):
    with grpc.insecure_channel(server.target) as channel:
        call = channel.unary_unary("/odma.v1.MemoryService/Apply")
        if reason:
            fails(service, engine.ref.name, call, message, code, None, reason)
            return
        before = books(service, engine.ref.name)
        with pytest.raises(grpc.RpcError) as caught:
            call(message)
        assert caught.value.code() == code
        assert books(service, engine.ref.name) == before
