"""Tenants' shares: a guarantee is kept, what is idle is lent, and comes back when asked for."""

from __future__ import annotations

import json
import urllib.request
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from running import run
from servers import metrics_address, open_pool
from typer.testing import CliRunner

from odma_service._native import Arena, ArenaGeometry, EngineRecord, PolicyRecord
from odma_service.cli import app
from odma_service.client import Client
from odma_service.client.local import ODMA
from odma_service.errors import InvalidError, RefusedError
from odma_service.pool.policy import named
from odma_service.replay import by_tenant
from odma_service.replay.load import Request
from odma_service.replay.loop import History, Sums
from odma_service.replay.measure import Window
from odma_service.values import (
    Allocate,
    Batch,
    End,
    Extend,
    Free,
    Moves,
    Overflow,
    Place,
    PolicyChange,
    Reason,
    Refusal,
    Start,
    TenantShare,
)

BLOCKS, UNIT = 256, 16
CLAIM_CALLS, CHANGE_CALLS = 4096, 64
TENANTS = ("a", "b", "c", "d", "")  # the last two are never named
GEOMETRY = ArenaGeometry(BLOCKS, UNIT, 256, 64, 256, BLOCKS * UNIT, 0)
ENGINE = EngineRecord(Moves.ANY, True, True, 2, 1e-6, 1e-7)


# --- records ---


def record(*tenants, **fields):
    return PolicyRecord("shares", Start.MAXIMUM, Overflow.COMPACT, tenants=tenants, **fields)


@pytest.mark.parametrize(
    ("tenants", "field"),
    [
        ([TenantShare("")], "tenants[0].name"),
        ([TenantShare("a"), TenantShare("é" * 17)], "tenants[1].name"),
        ([TenantShare("a\0")], "tenants[0].name"),
        ([TenantShare("a"), TenantShare("a", 0.1)], "tenants[1].name"),
        ([TenantShare("a", -0.1)], "tenants[0].guaranteed_share"),
        ([TenantShare("a", float("nan"))], "tenants[0].guaranteed_share"),
        ([TenantShare("a", 0.6, 0.5)], "tenants[0].guaranteed_share"),
        ([TenantShare("a", 0, 0)], "tenants[0].maximum_share"),
        ([TenantShare("a", 0, 1.1)], "tenants[0].maximum_share"),
        ([TenantShare("a", 0, float("nan"))], "tenants[0].maximum_share"),
        ([TenantShare("a", 0.5), TenantShare("b", 0.41)], "tenants"),
        ([TenantShare(str(i)) for i in range(17)], "tenants"),
    ],
)
def test_shares_that_cannot_be_kept_are_refused_by_field(tenants, field):
    with pytest.raises(InvalidError) as caught:
        record(*tenants, safety_share=0.1)
    assert caught.value.field == field


def test_guarantees_and_safety_share_may_fill_the_pool():
    tenth = [TenantShare(str(i), 0.1) for i in range(9)]
    assert record(*tenth, safety_share=0.1).tenants == tuple(tenth)


def test_tenants_are_changed_as_a_whole_or_kept():
    a, b = TenantShare("a", 0.5), TenantShare("b")
    policy = named("elastic", 4096, 4096).with_changes(tenants=[a, b])
    assert policy.with_changes(growth=2).tenants == (a, b)
    assert policy.with_changes(tenants=[b]).tenants == (b,)
    assert policy.with_changes(clear_tenants=True).tenants == ()
    with pytest.raises(InvalidError, match="clear_tenants"):
        policy.with_changes(tenants=[b], clear_tenants=True)


# --- the arena, from outside ---


class Shared:
    """An arena whose tenants are told apart; every batch has one operation at most."""

    def __init__(self, path, policy):
        self.arena = Arena.create(path, GEOMETRY)
        self.arena.set_policy(policy)
        self.arena.open_epoch(1, ENGINE, "boot", b"")
        self.path, self.policy, self.seq, self.ids = path, policy, 0, 0
        self.owner, self.length = {}, {}  # by handle

    def apply(self, *ops):
        self.seq += 1
        return self.arena.apply(1, Batch(self.seq, self.seq - 1, [], list(ops))).results

    def ask(self, tenant, blocks):
        self.ids += 1
        tokens = blocks * UNIT
        op = Allocate(f"{self.ids}", tokens, max_total_tokens=tokens, tenant=tenant)
        result = self.apply(op)[0]
        if isinstance(result, Place):
            self.owner[result.handle], self.length[result.handle] = tenant, blocks
        return result

    def free(self, handle, end=End.FINISHED):
        self.apply(Free(handle, end))
        del self.owner[handle], self.length[handle]

    def held(self):
        held = Counter()
        for handle, tenant in self.owner.items():
            held[tenant] += self.length[handle]
        return held

    def share(self, tenant, which):
        shares = {t.name: int(getattr(t, which) * BLOCKS) for t in self.policy.tenants}
        return shares.get(tenant, 0 if which == "guaranteed_share" else BLOCKS)

    def check(self):
        self.arena.check()
        held, regions = self.held(), Counter(self.owner.values())
        for use in self.arena.tenants():
            assert use.held_tokens == held[use.name] * UNIT
            assert use.regions == regions[use.name]

    def reattach(self):
        self.arena.close()
        self.arena = Arena.attach(self.path, GEOMETRY, "boot")


shares = st.lists(st.integers(0, 8), min_size=3, max_size=3).map(
    lambda eighths: tuple(
        TenantShare(name, part / max(sum(eighths), 8) * 0.9, 1.0)
        for name, part in zip("abc", eighths, strict=True)
    )
)
asked = st.tuples(st.sampled_from(TENANTS), st.integers(1, 60))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(shares, st.lists(asked, max_size=40), st.integers(0, 2), st.data())
def test_a_covered_request_is_let_in_once_those_it_names_have_made_way(
    tmp_path_factory, tenants, crowd, index, data
):
    shared = Shared(tmp_path_factory.mktemp("shares") / "pool", record(*tenants, safety_share=0.1))
    for tenant, blocks in crowd:
        shared.ask(tenant, blocks)
    owner = tenants[index].name
    left = shared.share(owner, "guaranteed_share") - shared.held()[owner]
    if left < 1:
        return
    blocks = data.draw(st.integers(1, left))
    for _ in range(len(shared.owner) + 1):
        result = shared.ask(owner, blocks)
        if isinstance(result, Place):
            break
        assert result.preempt_handle, f"nobody makes way: {result}"
        victim = shared.owner[result.preempt_handle]
        assert victim != owner
        assert shared.held()[victim] > shared.share(victim, "guaranteed_share")
        shared.free(result.preempt_handle, End.PREEMPTED)
        if data.draw(st.booleans()):
            shared.reattach()
        tenant, wanted = data.draw(asked)  # whoever comes now does not overtake
        over = shared.held()[tenant] + wanted > shared.share(tenant, "guaranteed_share")
        late = shared.ask(tenant, wanted)
        if tenant != owner and over:
            assert isinstance(late, Refusal)
            assert late.reason == Reason.CLAIMED
        elif isinstance(late, Place) and tenant == owner:
            shared.free(late.handle)
    assert isinstance(result, Place)
    shared.check()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.floats(0.05, 1), min_size=3, max_size=3),
    st.floats(0.05, 1),
    st.lists(st.tuples(asked, st.booleans()), max_size=60),
)
def test_nobody_is_admitted_beyond_his_maximum(tmp_path_factory, maxima, others, steps):
    tenants = [TenantShare(n, min(m, 0.3), m) for n, m in zip("abc", maxima, strict=True)]
    policy = record(*tenants, tenant_share=others)
    shared = Shared(tmp_path_factory.mktemp("shares") / "pool", policy)
    most = {t.name: int(t.maximum_share * BLOCKS) for t in tenants}
    for (tenant, blocks), frees in steps:
        held = shared.held()[tenant]
        result = shared.ask(tenant, blocks)
        limit = most.get(tenant, int(others * BLOCKS))
        over = limit < BLOCKS and held + blocks > limit
        never = Reason.INVALID if blocks > limit else Reason.QUOTA
        assert over == (isinstance(result, Refusal) and result.reason == never)
        assert shared.held()[tenant] <= limit
        if frees and shared.owner:
            shared.free(min(shared.owner))
    shared.reattach()
    shared.check()


def test_in_one_batch_a_guarantee_is_not_behind_what_others_were_refused(tmp_path):
    shared = Shared(tmp_path / "pool", record(TenantShare("a", 0.5), TenantShare("b", 0, 0.1)))

    def op(request_id, tenant, blocks):
        return Allocate(request_id, blocks * UNIT, max_total_tokens=blocks * UNIT, tenant=tenant)

    results = shared.apply(
        op("0", "b", 1),
        op("1", "c", 256),
        op("2", "c", 1),
        op("3", "a", 8),
        op("4", "a", 128),
        op("5", "a", 1),
    )
    assert [type(r) is Place or r.reason for r in results] == [
        True,
        Reason.NO_SPACE,
        Reason.SKIPPED,
        True,
        Reason.SKIPPED,  # beyond the guarantee: behind c's like anybody's
        Reason.SKIPPED,  # covered, but its own tenant's order is kept
    ]


def test_a_tenant_that_is_gone_holds_others_back_for_so_many_batches(tmp_path):
    shared = Shared(tmp_path / "pool", record(TenantShare("a", 0.5)))
    lent = shared.ask("b", BLOCKS)
    assert shared.ask("a", 10).preempt_handle == lent.handle
    shared.free(lent.handle, End.PREEMPTED)
    for _ in range(CLAIM_CALLS - CHANGE_CALLS - 1):
        assert shared.ask("b", 1).reason == Reason.CLAIMED
    assert isinstance(shared.ask("b", 1), Place)


def test_a_claim_lasts_as_long_as_it_is_renewed(tmp_path):
    shared = Shared(tmp_path / "pool", record(TenantShare("a", 0.5)))
    shared.ask("b", BLOCKS)
    for _ in range(3 * CLAIM_CALLS // CHANGE_CALLS):
        assert shared.ask("a", 10).reason == Reason.NO_SPACE
    assert shared.ask("b", 1).reason == Reason.CLAIMED


def grown(tmp_path, *crowd):
    """Return a pool that a, b and c are sure of a quarter of, and the crowd's handles."""
    tenants = [TenantShare(name, 0.25) for name in "abc"]
    policy = PolicyRecord("step", Start.STEP, Overflow.COMPACT, UNIT, tenants=tuple(tenants))
    shared = Shared(tmp_path / "pool", policy)
    ops = [
        Allocate(f"{i}", (blocks - 1) * UNIT, max_total_tokens=BLOCKS * UNIT, tenant=tenant)
        for i, (tenant, blocks) in enumerate(crowd)
    ]
    return shared, [place.handle for place in shared.apply(*ops)]


def test_growth_that_a_guarantee_covers_takes_from_borrowers_only(tmp_path):
    shared, (lent, mine, _, late) = grown(tmp_path, ("d", 100), ("a", 31), ("b", 64), ("d", 60))
    assert shared.apply(Extend(mine, 33 * UNIT))[0].preempt_handle == late
    shared.apply(Free(late, End.PREEMPTED))
    assert isinstance(shared.apply(Extend(mine, 64 * UNIT))[0], Place)
    # From here on it would borrow too. b is younger, and is left alone.
    assert shared.apply(Extend(mine, 93 * UNIT))[0].preempt_handle == mine
    shared.apply(Free(lent, End.FINISHED))
    assert isinstance(shared.apply(Extend(mine, 93 * UNIT))[0], Place)


def test_growth_that_a_guarantee_covers_may_take_from_the_oldest(tmp_path):
    shared, (lent, mine, _, _) = grown(tmp_path, ("d", 100), ("a", 31), ("b", 64), ("c", 61))
    assert shared.apply(Extend(mine, 40 * UNIT))[0].preempt_handle == lent


# --- over the wire ---

SHARES = [
    TenantShare("chat", 0.5),
    TenantShare("batch", 0, 0.75),
]


def tenants_of(service, name):
    return {tenant.name: tenant for tenant in service.get_pool(name).tenants}


def policy_change(**fields):
    return PolicyChange(name="static", tenants=SHARES, **fields)


def whole(request_id, tokens, tenant):
    return Allocate(request_id, tokens, max_total_tokens=tokens, tenant=tenant)


def test_what_was_lent_comes_back_over_the_wire_and_after_kill_9(servers):
    server = servers()
    with Client(server.target) as service:
        pool = open_pool(service, "shared", policy=policy_change())
        _, other = pool.apply(
            ops=[whole("1", 2048, "batch"), whole("2", 2048, "elsewhere")]
        ).results
        refusal = pool.apply(ops=[whole("3", 1024, "chat")]).results[0]
        assert refusal.reason is Reason.NO_SPACE
        assert refusal.preempt_handle == other.handle
        before = tenants_of(service, "shared")
        assert (before["batch"].held_tokens, before["batch"].borrowed_tokens) == (2048, 2048)
        assert (before["chat"].guaranteed_tokens, before["chat"].claimed_tokens) == (2048, 1024)
        assert (before["chat"].maximum_tokens, before["batch"].maximum_tokens) == (4096, 3072)
        server.restart()
    with Client(server.target) as service:
        assert tenants_of(service, "shared") == before


def test_an_unary_allocate_names_who_should_make_way(service, name):
    pool = open_pool(service, name, policy=policy_change())
    lent = pool.allocate(Allocate("1", 4096, max_total_tokens=4096, tenant="elsewhere"))
    with pytest.raises(RefusedError) as caught:
        pool.allocate(Allocate("2", 1024, max_total_tokens=1024, tenant="chat"))
    assert caught.value.refusal.preempt_handle == lent.handle
    pool.free(Free(lent.handle, End.PREEMPTED))
    with pytest.raises(RefusedError) as caught:
        pool.allocate(Allocate("3", 16, max_total_tokens=16, tenant="batch"))
    assert caught.value.refusal.reason == Reason.CLAIMED
    assert (
        pool.allocate(Allocate("2", 1024, max_total_tokens=1024, tenant="chat")).length_tokens
        == 1024
    )
    assert pool.allocate(Allocate("3", 16, max_total_tokens=16, tenant="batch")).length_tokens == 16


def test_another_policy_keeps_the_tenants_unless_it_says_otherwise(service, name):
    pool = open_pool(service, name, policy=policy_change())
    assert [t.name for t in pool.set_policy(PolicyChange(name="odma")).tenants] == [
        "chat",
        "batch",
    ]
    with pytest.raises(InvalidError) as caught:
        pool.set_policy(PolicyChange(name="elastic", safety_share=0.6))
    assert caught.value.field == "policy.tenants"
    changed = PolicyChange(tenants=[TenantShare("new", 0.25)])
    assert [(t.name, t.maximum_share) for t in pool.set_policy(changed).tenants] == [("new", 1)]
    assert not pool.set_policy(PolicyChange(clear_tenants=True)).tenants
    assert not service.get_pool(name).tenants


def test_status_shows_what_tenants_hold(server, service, name):
    pool = open_pool(service, name, policy=policy_change())
    pool.apply(ops=[whole("1", 2560, "chat")])
    shown = run(*ODMA, "status", name, "--target", server.target)
    *_, row = (line for line in shown.splitlines() if "chat" in line)  # the policy names it, too
    assert [word for word in row.split() if word[0].isdigit()][-6:] == [
        "1", "2,560", "2,048", "4,096", "512", "0",
    ]  # fmt: skip


def test_metrics_tell_of_named_tenants_only(servers):
    server = servers("--metrics-listen", "127.0.0.1:0", "--log-format", "json")
    with Client(server.target) as service:
        pool = open_pool(service, "shared", policy=policy_change())
        pool.apply(ops=[whole("1", 2560, "chat"), whole("2", 1024, "elsewhere")])
    with urllib.request.urlopen(f"http://{metrics_address(server)}/metrics", timeout=10) as page:
        families = text_string_to_metric_families(page.read().decode())
        told = {
            (sample.name.removeprefix("odma_pool_tenant_"), sample.labels["tenant"]): sample.value
            for family in families
            for sample in family.samples
            if "tenant" in sample.labels
        }
    assert told == {
        ("held_tokens", "chat"): 2560,
        ("guaranteed_tokens", "chat"): 2048,
        ("maximum_tokens", "chat"): 4096,
        ("borrowed_tokens", "chat"): 512,
        ("claimed_tokens", "chat"): 0,
        ("held_tokens", "batch"): 0,
        ("guaranteed_tokens", "batch"): 0,
        ("maximum_tokens", "batch"): 3072,
        ("borrowed_tokens", "batch"): 0,
        ("claimed_tokens", "batch"): 0,
    }


# --- the replay ---


def test_measures_are_told_apart_by_tenant():
    requests = [Request(10, 10 + 100 * (i + 1), 1000, False, "", tenant="ab"[i]) for i in (0, 1)]
    second = 10**12
    history = History([0, second], [2 * second, 4 * second], [9 * second, 10 * second])
    history.sums = [Sums(now_ps=9 * second), Sums(now_ps=10 * second)]
    history.finished, history.preempted = [0, 1], [1, 1]
    told = by_tenant(history, Window(0, 2, steady=False), requests)
    assert [(t, m.requests, m.tokens_per_s, m.preemptions) for t, m in told.items()] == [
        ("a", 1, 10, 0),
        ("b", 1, 20, 2),
    ]
    assert (told["a"].ttft_s.p50, told["b"].ttft_s.p50) == (2, 3)


def test_a_guarantee_shortens_its_owners_wait_in_the_replay():
    ran = CliRunner().invoke(app, ["bench", "tenants", "--seeds", "1", "--json"])
    assert ran.exit_code == 0, ran.output
    variants = json.loads(ran.stdout)["variants"]
    waits = {name: row["steady_wait_p99_s"]["mean"] for name, row in variants.items()}
    assert waits["steady guaranteed"] < waits["no shares"] / 2
    assert variants["no shares"]["steady_preemptions"]["mean"] >= 0
    assert np.isfinite(list(waits.values())).all()
