"""The service over gRPC: pools and their epochs, every rpc, and what errors tell."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from registries import open_in, registry_of, state
from servers import CAPACITY_TOKENS, books, open_pool, places_of

from odma_service.client import Client
from odma_service.errors import (
    BooksCorruptError,
    BooksUnavailableError,
    EpochError,
    HandleError,
    InvalidError,
    NothingLearntError,
    PoolLimitError,
    PoolNotFoundError,
    PoolOwnedError,
    RefusedError,
    VersionError,
)
from odma_service.pool import Pool
from odma_service.rpc.v1 import memory_service_pb2 as pb
from odma_service.rpc.v1 import pool_service_pb2 as pool_pb
from odma_service.rpc.v1 import (
    pool_service_pb2_grpc,
)
from odma_service.rpc.v1 import types_pb2 as types
from odma_service.rpc.v1.memory_service_pb2_grpc import MemoryServiceStub
from odma_service.service.rpc.pools import PoolService
from odma_service.values import (
    Allocate,
    Batch,
    End,
    Extend,
    Free,
    Freed,
    Moves,
    Place,
    PolicyChange,
    Reason,
    Reconciled,
    Trim,
    Used,
)
from odma_service.wire import op_to

PREFIX = "odma.v1."


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server.target) as channel:
        yield channel


# --- what is served ---


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("", "SERVING"),
        (PREFIX + "MemoryService", "SERVING"),
        (PREFIX + "PoolService", "SERVING"),
        (PREFIX + "PredictorService", "SERVING"),
        (PREFIX + "EmulatorService", "SERVING"),
    ],
)
def test_the_standard_health_service_tells_what_works(channel, name, status):
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
    assert health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) == status


def services_by_reflection(target: str) -> Iterator[str]:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.insecure_channel(target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        for answer in stub.ServerReflectionInfo(iter([request])):
            yield from (service.name for service in answer.list_services_response.service)


def test_reflection_is_off_unless_asked_for(server):
    with pytest.raises(grpc.RpcError) as caught:
        list(services_by_reflection(server.target))
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_reflection_can_be_switched_on(servers):
    served = set(services_by_reflection(servers("--reflection").target))
    assert {PREFIX + "MemoryService", PREFIX + "PoolService"} <= served


# --- pools and epochs ---


def test_a_pool_is_opened_with_what_it_was_asked_for(service, name):
    response = open_pool(service, name, capacity_tokens=1000, model_length_tokens=500).response
    assert response.pool.name == name
    assert response.capacity_tokens == 992
    assert response.model_length_tokens == 500
    assert response.bytes_per_token == 128
    assert (response.block_tokens, response.max_regions) == (16, 1024)
    assert min(response.max_ops, response.max_copies, response.policy_version) >= 1


def test_a_capacity_in_bytes_is_rounded_down_to_blocks(service, name):
    pool = open_pool(service, name, capacity_tokens=None, capacity_bytes=100 * 128 - 1)
    assert pool.response.capacity_tokens == 96


def test_a_model_config_gives_planes_and_model_length(service, name):
    config = (
        '{"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,'
        ' "hidden_size": 3584, "torch_dtype": "bfloat16", "max_position_embeddings": 131072}'
    )
    response = open_pool(
        service,
        name,
        planes=(),
        config_json=config,
        tensor_parallel=2,
        capacity_tokens=None,
        capacity_bytes=2**32,
    ).response
    assert response.bytes_per_token == 28 * 2 * 2 * 128 * 2
    assert response.model_length_tokens == 131_072


@pytest.mark.parametrize(
    ("moves", "policy"),
    [
        (Moves.ANY, "elastic"),
        (Moves.OWN_GROWTH, "odma"),
        (Moves.NONE, "odma"),
    ],
)
def test_the_first_policy_suits_what_may_be_moved(service, name, moves, policy):
    open_pool(service, name, moves=moves)
    assert service.get_pool(name).policy.name == policy


def test_the_first_policy_can_be_chosen_and_changed(service, name):
    change = PolicyChange(name="odma", limits_tokens=[64, 4096], safety_share=0.25)
    open_pool(service, name, policy=change)
    policy = service.get_pool(name).policy
    assert (policy.name, list(policy.limits_tokens)) == ("odma", [64, 4096])
    assert policy.safety_share == 0.25


def test_the_same_open_id_gets_the_same_epoch(service, name):
    first = open_pool(service, name, open_id="once")
    first.allocate(Allocate("r", 10))
    before = books(service, name)
    again = open_pool(service, name, open_id="once").response
    assert again.pool.owner == first.response.pool.owner + 1
    again.pool.owner = first.response.pool.owner
    assert again == first.response
    assert books(service, name) == before


def test_the_same_open_id_with_other_fields_is_refused(service, name):
    open_pool(service, name, open_id="once")
    with pytest.raises(InvalidError, match="open_id"):
        open_pool(service, name, open_id="once", block_tokens=32)


def test_a_pool_that_is_owned_cannot_be_opened(service, pool, name):
    with pytest.raises(PoolOwnedError) as caught:
        open_pool(service, name)
    assert 0 <= caught.value.idle_seconds < 60


def test_taking_over_ends_the_old_epoch(service, pool, name):
    pool.allocate(Allocate("r", 10))
    new = open_pool(service, name, take_over=True)
    assert new.ref.epoch > pool.ref.epoch
    assert service.list_regions(name) == []
    with pytest.raises(EpochError):
        pool.apply()


def test_closing_twice_is_fine(service, pool, name):
    pool.close_pool()
    pool.close_pool()
    assert service.get_pool(name).summary.state == pool_pb.POOL_STATE_CLOSED


def test_an_older_epoch_cannot_be_closed(service, pool, name):
    open_pool(service, name, take_over=True)
    with pytest.raises(EpochError):
        pool.close_pool()


def test_a_closed_pool_answers_no_owner(service, pool, name):
    pool.close_pool()
    with pytest.raises(EpochError):
        pool.allocate(Allocate("r", 10))


def test_what_was_learnt_outlives_the_epoch(service, pool, name):
    version = pool.set_policy(PolicyChange(name="s3")).version
    [place] = pool.apply(ops=[Allocate("r", 10)]).results
    pool.free(Free(place.handle, End.FINISHED, 5))
    pool.close_pool()
    again = open_pool(service, name)
    assert again.response.policy_version == version
    assert service.get_pool(name).counters.finished == 1


def test_another_geometry_starts_with_new_books(service, pool, name):
    pool.set_policy(PolicyChange(name="s3"))
    pool.close_pool()
    again = open_pool(service, name, block_tokens=32)
    assert again.ref.epoch > pool.ref.epoch
    assert service.get_pool(name).policy.name == "elastic"
    assert service.get_pool(name).counters.batches == 0


def test_the_list_has_every_pool_by_name(service, name):
    names = [f"{name}-{letter}" for letter in "cab"]
    for each in names:
        open_pool(service, each)
    listed = [summary.pool.name for summary in service.list_pools().pools]
    assert listed == sorted(listed)
    assert set(names) <= set(listed)


def test_an_unknown_pool_is_not_found(service, name):
    with pytest.raises(PoolNotFoundError):
        service.get_pool(name)


# --- batches ---


def test_a_batch_answers_each_operation_in_order(service, pool, name):
    first = pool.apply(ops=[Allocate(f"r{i}", 100) for i in range(3)])
    handles = [place.handle for place in first.results]
    answer = pool.apply(
        used=[Used(handle, 100) for handle in handles],
        ops=[
            Free(handles[0], End.FINISHED, 20),
            Free(handles[0], End.FINISHED, 20),
            Extend(handles[1], 500),
            Trim(handles[2], 101),
            Allocate("too long", 4000),
            Allocate("after it", 10),
        ],
        completed_seq=1,
    )
    once, again, grown, trimmed, too_long, after_it = answer.results
    assert (once, again) == (Freed(), Freed(already_free=True))
    assert grown.length_tokens >= 500
    assert trimmed.length_tokens == 112
    assert too_long.reason is Reason.NO_SPACE
    assert after_it.reason is Reason.SKIPPED
    assert (answer.seq, answer.replayed) == (2, False)
    assert places_of(service, name) == {"r1": grown, "r2": trimmed}


def test_a_region_that_grows_is_copied(pool):
    first = pool.apply(ops=[Allocate("a", 100), Allocate("b", 100)])
    a, b = first.results
    answer = pool.apply(used=[Used(a.handle, 100), Used(b.handle, 90)], ops=[Extend(a.handle, 400)])
    assert [copy.tokens for copy in answer.copies] in ([100], [90])
    assert answer.copies[0].handle in (a.handle, b.handle)


def test_a_bad_value_is_the_result_of_its_operation_alone(pool):
    answer = pool.apply(ops=[Allocate("a", 0), Allocate("b", 10)], pass_refused=True)
    refusal, place = answer.results
    assert refusal.reason is Reason.INVALID
    assert refusal.field.startswith("prompt_tokens: ")
    assert isinstance(place, Place)


def test_concurrent_retries_of_a_batch_get_one_answer(service, server, pool):
    request = pb.ApplyRequest(pool=pool.numbered(), seq=1, ops=[op_to(Allocate("r", 10))])
    answers = []
    start = threading.Barrier(8)

    def send():
        with Client(server.target) as client:
            start.wait()
            answers.append(client.call(client.memory.Apply, request))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.replayed for answer in answers) == [False] + [True] * 7
    assert len({str(answer.results) for answer in answers}) == 1
    assert service.get_pool(pool.ref.name).summary.regions == 1


# --- unary calls ---


def test_the_same_request_id_gets_the_same_region(pool):
    first = pool.allocate(Allocate("r", 100))
    assert pool.allocate(Allocate("r", 100)) == first
    with pytest.raises(InvalidError, match=r"allocate\.request_id"):
        pool.allocate(Allocate("r", 101))


def test_extending_alone_grows_in_place_or_is_refused(pool):
    first, second = pool.allocate(Allocate("a", 100)), pool.allocate(Allocate("b", 100))
    assert pool.extend(Extend(second.handle, 1000)).start_token == second.start_token
    with pytest.raises(RefusedError) as caught:
        pool.extend(Extend(first.handle, 1000))
    assert caught.value.refusal.reason in (Reason.FRAGMENTED, Reason.COPY_BUDGET)


def test_freeing_again_says_so(pool):
    place = pool.allocate(Allocate("r", 100))
    assert pool.free(Free(place.handle, End.ABORTED)) == Freed()
    assert pool.free(Free(place.handle, End.ABORTED)) == Freed(already_free=True)
    with pytest.raises(HandleError):
        pool.free(Free(place.handle + 2**40, End.ABORTED))


def test_what_is_not_listed_is_freed(service, pool, name):
    keep, drop = pool.allocate(Allocate("keep", 10)), pool.allocate(Allocate("drop", 10))
    pool.apply()
    answer = pool.reconcile([keep.handle, 12345])
    assert answer == Reconciled([keep], [12345], [drop.handle], last_seq=1)
    assert places_of(service, name) == {"keep": keep}
    assert pool.apply().seq == 2


# --- policy ---


def test_a_policy_is_changed_only_from_the_expected_version(service, pool, name):
    version = service.get_pool(name).policy.version
    changed = pool.set_policy(PolicyChange(safety_share=0.5), expected_version=version)
    assert (changed.safety_share, changed.version) == (0.5, version + 1)
    with pytest.raises(VersionError) as caught:
        pool.set_policy(PolicyChange(safety_share=0.1), expected_version=version)
    assert caught.value.actual == version + 1
    assert service.get_pool(name).policy.safety_share == 0.5


def learn(pool, lengths):
    for i, length in enumerate(lengths):
        place = pool.allocate(Allocate(f"r{i}", 10))
        pool.free(Free(place.handle, End.FINISHED, length))


def test_recalibration_finds_the_limits_that_fit(service, name):
    pool = open_pool(service, name, policy=PolicyChange(name="odma"))
    learn(pool, [70, 600] * 20)
    before = books(service, name)
    dry = pool.recalibrate(dry_run=True, limits=3)
    assert books(service, name) == before
    assert not dry.installed
    assert dry.after.waste_tokens < dry.before.waste_tokens
    done = pool.recalibrate(limits=3, expected_version=dry.policy_version)
    assert done.installed
    assert done.after == dry.after
    policy = service.get_pool(name).policy
    assert list(policy.limits_tokens) == list(done.after.limits_tokens)
    assert policy.version == done.policy_version
    with pytest.raises(VersionError):
        pool.recalibrate(expected_version=dry.policy_version)


def test_nothing_is_recalibrated_from_nothing(service, name):
    pool = open_pool(service, name, policy=PolicyChange(name="odma"))
    with pytest.raises(NothingLearntError, match="32"):
        pool.recalibrate()
    pool.set_policy(PolicyChange(name="elastic"))
    with pytest.raises(NothingLearntError, match="buckets"):
        pool.recalibrate()


# --- reading ---


def test_the_books_add_up(service, pool, name):
    pool.apply(ops=[Allocate(f"r{i}", 100, request_class="chat") for i in range(5)])
    facts = service.get_pool(name)
    regions = service.list_regions(name)
    reserved = sum(region.place.length_tokens for region in regions)
    assert facts.reserved_tokens == reserved
    assert facts.summary.free_tokens + reserved == CAPACITY_TOKENS
    assert facts.summary.regions == len(regions) == 5
    assert {region.request_class for region in regions} == {"chat"}
    assert facts.counters.allocates == 5
    assert list(facts.planes) == [types.PlaneGroup(count=2, bytes_per_token=64, alignment_bytes=1)]


def test_buckets_count_the_regions_below_their_limits(service, name):
    change = PolicyChange(name="static", limits_tokens=[100, 1000, 4096])
    pool = open_pool(service, name, policy=change)
    for i, maximum in enumerate([50, 90, 900]):
        pool.allocate(Allocate(f"r{i}", 10, max_total_tokens=maximum))
    counted = {use.limit_tokens: use.regions for use in service.get_pool(name).buckets}
    assert counted == {100: 2, 1000: 1, 4096: 0}


def test_regions_come_in_pages(service, channel, pool, name):
    pool.apply(ops=[Allocate(f"r{i}", 10) for i in range(10)])
    stub = pool_service_pb2_grpc.PoolServiceStub(channel)
    request, found = pool_pb.ListRegionsRequest(name=name, page_size=3), []
    for size in (3, 3, 3, 1):
        page = stub.ListRegions(request)
        assert len(page.regions) == size
        found += page.regions
        request.from_token = page.next_token
    assert not page.HasField("next_token")
    assert found == service.list_regions(name)


def test_what_was_learnt_is_shown_by_class(service, pool, name):
    for i in range(40):
        place = pool.allocate(Allocate(f"r{i}", 10, request_class="chat" if i % 2 else ""))
        end = End.FINISHED if i < 30 else End.HIT_LIMIT
        pool.free(Free(place.handle, end, 100))
    facts = service.get_pool(name)
    assert {known.request_class for known in facts.classes} == {"", "chat"}
    for known in facts.classes:
        assert known.finished > known.hit_limit > 0
        assert len(known.output_quantiles_tokens) == 7
    for histogram in (facts.output_histogram, facts.total_histogram):
        assert len(histogram) == 1
        assert histogram[0].finished > histogram[0].hit_limit > 0


# --- what errors tell ---


def details_of(error, kind):
    message = kind()
    assert any(detail.Unpack(message) for detail in rpc_status.from_call(error).details)
    return message


def test_an_error_names_the_field_in_every_way(channel, pool):
    operation = pb.Alloc(request_id="r", prompt_tokens=10, overflow_risk=2)
    with pytest.raises(grpc.RpcError) as caught:
        MemoryServiceStub(channel).Allocate(
            pb.AllocateRequest(pool=pool.numbered(), allocate=operation)
        )
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    info = details_of(caught.value, error_details_pb2.ErrorInfo)
    assert (info.domain, info.reason) == ("odma", "INVALID")
    assert dict(info.metadata) == {"field": "allocate.overflow_risk", "rule": "0 to 1"}
    [violation] = details_of(caught.value, error_details_pb2.BadRequest).field_violations
    assert (violation.field, violation.description) == ("allocate.overflow_risk", "0 to 1")
    assert details_of(caught.value, types.Refusal).reason == types.REFUSAL_REASON_INVALID


def test_a_refused_call_carries_the_refusal_and_when_to_retry(channel, pool):
    pool.allocate(Allocate("a", 4000))
    request = pb.AllocateRequest(
        pool=pool.numbered(), allocate=pb.Alloc(request_id="b", prompt_tokens=1000)
    )
    with pytest.raises(grpc.RpcError) as caught:
        MemoryServiceStub(channel).Allocate(request)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    refusal = details_of(caught.value, types.Refusal)
    assert refusal.reason == types.REFUSAL_REASON_NO_SPACE
    assert refusal.retry_after_ms > 0
    delay = details_of(caught.value, error_details_pb2.RetryInfo).retry_delay
    assert delay.nanos == refusal.retry_after_ms * 1_000_000


def test_an_unknown_pool_is_named_as_a_resource(channel, name):
    stub = pool_service_pb2_grpc.PoolServiceStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetPool(pool_pb.GetPoolRequest(name=name))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    resource = details_of(caught.value, error_details_pb2.ResourceInfo)
    assert (resource.resource_type, resource.resource_name) == ("pool", name)


# --- the registry, with clocks of its own ---


def test_a_silent_owner_loses_its_pool_only_after_the_retention_time(registry, clock):
    epoch = open_in(registry, "p", ttl_seconds=5, retention_seconds=10).epoch
    clock.now += 10
    assert state(registry, "p") == (epoch, 10)
    with registry.owned("p", epoch):
        pass
    assert state(registry, "p") == (epoch, 0)
    clock.now += 10.1
    registry.reap()
    assert state(registry, "p")[0] == 0
    with pytest.raises(EpochError), registry.owned("p", epoch):
        pass


def test_epochs_rise_even_when_the_clock_does_not(registry, clock):
    first = open_in(registry, "p").epoch
    registry.close_epoch("p", first)
    clock.now -= 500
    second = open_in(registry, "p", open_id="again").epoch
    assert second == first + 1


def test_an_epoch_of_lost_books_is_not_given_again(registry, clock, tmp_path):
    first = open_in(registry, "p").epoch
    registry.close()
    (tmp_path / "p.pool").unlink()
    clock.now += 1
    assert open_in(registry_of(tmp_path, clock), "p").epoch > first


def test_no_more_pools_are_opened_than_allowed(registry):
    for name in "abc":
        open_in(registry, name)
    with pytest.raises(PoolLimitError, match="max-pools"):
        open_in(registry, "d")
    assert registry.names() == ["a", "b", "c"]


def test_the_pool_opened_longest_ago_makes_room_once_it_is_closed(registry, clock, tmp_path):
    for name in "abc":
        registry.close_epoch(name, open_in(registry, name).epoch)
        clock.now += 1
    open_in(registry, "d")
    assert registry.names() == ["b", "c", "d"]
    assert not (tmp_path / "a.pool").exists()


def test_an_epoch_does_not_outlive_the_machine(registry, clock, tmp_path):
    open_in(registry, "p")
    registry.close()
    after = registry_of(tmp_path, clock, boot_id="another boot")
    after.attach_all()
    assert state(after, "p")[0] == 0
    after.close()


def test_broken_books_are_set_aside_with_a_reason(registry, clock, tmp_path):
    for name in "ab":
        open_in(registry, name)
    registry.close()
    (tmp_path / "a.pool").write_bytes(b"nonsense")
    after = registry_of(tmp_path, clock)
    after.attach_all()
    assert after.names() == ["b"]
    [aside] = tmp_path.glob("a.pool.set-aside-*[0-9]")
    assert aside.read_bytes() == b"nonsense"
    assert Path(f"{aside}.reason").read_text()
    with pytest.raises(PoolNotFoundError), after.viewed("a"):
        pass
    open_in(after, "a")
    after.close()


HOLDER = """
import sys; from pathlib import Path; from odma_service.pool import Pool
pool = Pool.attach(Path(sys.argv[1]), "boot"); print("held", flush=True); input()
"""


def test_books_that_another_process_has_are_left_alone_until_it_gives_them_up(
    registry, clock, tmp_path
):
    epoch = open_in(registry, "p").epoch
    registry.close()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "p.pool")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    after = registry_of(tmp_path, clock)
    after.attach_all()
    assert after.names() == []
    holder.communicate("\n")
    assert state(after, "p")[0] == epoch
    after.close()


def test_failing_to_open_leaves_the_old_epoch(registry, monkeypatch):
    epoch = open_in(registry, "p").epoch
    registry.close_epoch("p", epoch)

    def no_room(*_):
        raise PoolLimitError("the file system is full")

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "create", no_room)
        with pytest.raises(PoolLimitError):
            open_in(registry, "p", open_id="again", block_tokens=32)
    with registry.viewed("p") as view:
        assert view.pool.report().last_epoch == epoch
        assert view.pool.spec.block_tokens == 16


def test_a_slow_call_holds_up_nobody_of_another_pool(registry):
    epochs = {name: open_in(registry, name).epoch for name in "ab"}
    done = threading.Event()

    def use_the_other():
        with registry.owned("b", epochs["b"]) as learner:
            learner.apply(epochs["b"], Batch(1, 0, [], [Allocate("r", 10)]))
        done.set()

    with registry.owned("a", epochs["a"]):
        threading.Thread(target=use_the_other).start()
        assert done.wait(30)


def test_readers_wait_for_no_call_of_the_owner_and_it_for_none_of_them(registry):
    epoch = open_in(registry, "p").epoch
    service = PoolService(registry)

    def read():
        [summary] = service.ListPools(pool_pb.ListPoolsRequest(), None).pools
        facts = service.GetPool(pool_pb.GetPoolRequest(name="p"), None)
        page = service.ListRegions(pool_pb.ListRegionsRequest(name="p"), None)
        return summary.regions, facts.last_seq, len(page.regions)

    def work(seq):
        with registry.owned("p", epoch) as learner:
            learner.apply(epoch, Batch(seq, 0, [], [Allocate(f"r{seq}", 10)]))

    with ThreadPoolExecutor(1) as another:
        with registry.owned("p", epoch):
            assert another.submit(read).result(timeout=30) == (0, 0, 0)
        with registry.viewed("p"):
            another.submit(work, 1).result(timeout=30)
    assert read() == (1, 1, 1)  # what was answered is seen


def test_readers_see_a_pool_at_all_times_though_its_books_are_made_anew(registry):
    service, over = PoolService(registry), threading.Event()
    open_in(registry, "p")

    def read():
        looks = 0
        while not over.is_set():
            facts = service.GetPool(pool_pb.GetPoolRequest(name="p"), None)
            assert facts.summary.free_tokens == facts.summary.capacity_tokens == 1024
            looks += 1
        return looks

    with ThreadPoolExecutor(3) as readers:
        reading = [readers.submit(read) for _ in range(3)]
        for block_tokens in [32, 16] * 20:
            open_in(
                registry, "p", open_id=str(block_tokens), block_tokens=block_tokens, take_over=True
            )
        over.set()
        assert all(done.result(timeout=30) for done in reading)


def test_books_that_fail_a_reader_are_read_again(registry):
    epoch = open_in(registry, "p").epoch
    with pytest.raises(BooksUnavailableError, match="read again"), registry.viewed("p"):
        raise BooksCorruptError("a page of them failed")
    assert state(registry, "p")[0] == epoch
