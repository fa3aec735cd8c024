"""Policies: the four named records and what may be changed in one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odma_service.errors import InvalidError
from odma_service.pool.policy import NAMES, PolicyRecord, named
from odma_service.values import Overflow, Start


def test_the_four_records_are_those_of_the_design():
    static, s3, odma, elastic = (named(name, 16_384, 111_000) for name in NAMES)
    assert (static.start, static.overflow) == (Start.MAXIMUM, Overflow.PREEMPT)
    assert (static.safety_share, static.limits_tokens) == (0, ())
    assert (s3.start, s3.overflow) == (Start.QUANTILE, Overflow.PREEMPT)
    assert (s3.overflow_risk, s3.growth) == (0.5, 2)
    assert (odma.start, odma.overflow) == (Start.QUANTILE, Overflow.RELOCATE)
    assert len(odma.limits_tokens) == 12
    assert (elastic.start, elastic.overflow) == (Start.STEP, Overflow.COMPACT)
    assert elastic.limits_tokens == ()


def test_s3_has_ten_buckets_of_equal_width():
    assert named("s3", 16_000, 111_000).limits_tokens == tuple(range(1_600, 16_001, 1_600))


@given(st.sampled_from(NAMES), st.integers(1, 2**24), st.integers(1, 2**28))
def test_the_last_limit_holds_the_longest_request(name, model_length_tokens, capacity_tokens):
    limits = named(name, model_length_tokens, capacity_tokens).limits_tokens
    assert not limits or limits[-1] == min(model_length_tokens, capacity_tokens)


def test_another_name_is_refused():
    with pytest.raises(InvalidError) as caught:
        named("paged", 1, 1)
    assert caught.value.field == "name"


def test_a_change_keeps_all_else():
    odma = named("odma", 1024, 1024)
    changed = odma.with_changes(safety_share=0, max_copy_tokens=0)
    assert (changed.safety_share, changed.max_copy_tokens) == (0, 0)
    assert changed.with_changes(safety_share=odma.safety_share, max_copy_tokens=1024) == odma


def test_limits_are_replaced_or_removed():
    odma = named("odma", 1024, 1024)
    assert odma.with_changes(limits_tokens=[5, 7]).limits_tokens == (5, 7)
    assert odma.with_changes(clear_limits=True).limits_tokens == ()
    with pytest.raises(InvalidError, match="clear_limits"):
        odma.with_changes(limits_tokens=[5], clear_limits=True)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("step_tokens", [0, -1, 2**20 + 1, 1.5]),
        ("limits_tokens", [[0], [2, 2], [3, 2], range(1, 18), [2**28 + 1], [1.5]]),
        ("overflow_risk", [-0.1, 1.1, NAN]),
        ("safety_share", [-0.1, 0.91, NAN]),
        ("unsure_ratio", [-1, 0.5, NAN, INF]),
        ("growth", [0.9, 4.1, NAN]),
        ("tenant_share", [0, -1, 1.1, NAN]),
        ("max_copy_tokens", [-1, 2**32]),
    ],
)
def test_a_field_that_breaks_its_rule_is_named(field, values):
    for value in values:
        with pytest.raises(InvalidError) as caught:
            named("odma", 1024, 1024).with_changes(**{field: value})
        assert caught.value.field == field


def test_a_name_has_at_most_32_bytes():
    PolicyRecord("é" * 16, Start.STEP, Overflow.COMPACT)
    for name in ("", "é" * 17):
        with pytest.raises(InvalidError, match="name"):
            PolicyRecord(name, Start.STEP, Overflow.COMPACT)
