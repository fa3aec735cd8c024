"""Survival: one estimate of lengths that are only partly known, to the last digit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odma_service.learning.survival import Distribution, kaplan_meier, life_table, outliving

ENTERED = np.array([-np.inf, -np.inf, 1.5, -np.inf, 0.5, -np.inf, 2.25])
REACHED = np.array([3.0, 1.0, 2.0, 2.0, 5.0, 4.0, 2.5])
ENDED = np.array([1, 1, 0, 1, 0, 1, 1], bool)
LEVELS = np.array([0.1, 0.5, 0.95])
WEIGHTS = st.lists(st.integers(0, 5), min_size=6, max_size=6)


def numbers(*hexadecimal):
    return [float.fromhex(each) for each in hexadecimal]


def test_a_life_table_is_of_those_who_reached_each_length():
    table = life_table(ENTERED, REACHED, ENDED)
    assert table.logs.tolist() == [1, 2, 2.5, 3, 4, 5]
    assert table.weights.tolist() == numbers(
        "0x1.9999999999998p-3",
        "0x1.47ae147ae1478p-3",
        "0x1.47ae147ae147cp-3",
        "0x1.47ae147ae147ap-3",
        "0x1.47ae147ae147dp-3",
        "0x1.47ae147ae147dp-3",
    )
    assert (table.completions, table.unseen) == (5, table.weights[-1])
    assert table.at(LEVELS).tolist() == pytest.approx([1.42, 2.6875, 4.7375], rel=1e-15)


def test_what_outlives_a_life_table_lies_beyond_it_in_equal_parts():
    table = life_table(ENTERED, REACHED, ENDED, (0.1, 0.35, 0.9))
    assert table.logs.tolist() == [1, 2, 2.5, 3, 4, 5.1, 5.35, 5.9]
    assert table.weights[5:].tolist() == numbers("0x1.b4e81b4e81b51p-5") * 3
    assert table.at(LEVELS).tolist() == pytest.approx(
        numbers("0x1.792c5f92c5f94p+0", "0x1.6d55555555556p+1", "0x1.5a5c28f5c28f5p+2"), rel=1e-15
    )


def test_weights_of_a_histogram_are_spread_over_the_longer_lengths():
    finished = np.array([0.7, 0.0, 1.3, 0.1, 0.0, 0.0])
    censored = np.array([0.2, 0.9, 0.0, 0.4, 0.3, 0.0])
    assert kaplan_meier(finished, censored).tolist() == numbers(
        "0x1.6666666666667p-1",
        "0x0.0p+0",
        "0x1.fb1fb1fb1fb1ep+0",
        "0x1.381381381380fp-3",
        "0x0.0p+0",
        "0x1.1111111111110p+0",
    )


def test_weights_of_single_requests_are_as_those_of_a_histogram():
    censored = np.array([0, 0, 1, 0, 1, 0, 1.0])
    assert kaplan_meier(1 - censored, censored).tolist() == numbers(
        "0x1.ffffffffffffcp-1",
        "0x1.ffffffffffffcp-1",
        "0x0.0p+0",
        "0x1.4000000000001p+0",
        "0x0.0p+0",
        "0x1.e000000000002p+0",
        "0x1.e000000000002p+0",
    )


@given(WEIGHTS, WEIGHTS)
def test_stopped_requests_go_to_the_longer_lengths(finished, censored):
    finished, censored = np.array(finished, float), np.array(censored, float)
    weights = kaplan_meier(finished, censored)
    assert weights.sum() == pytest.approx((finished + censored).sum())
    assert np.all(weights >= 0)
    longer = np.cumsum(weights[::-1])[::-1]
    assert np.all(longer >= np.cumsum((finished + censored)[::-1])[::-1] - 1e-9)


def test_stopped_requests_are_spread_as_the_finished_ones_lie():
    finished, censored = np.array([2.0, 0, 1, 3, 0]), np.array([0, 4.0, 0, 0, 0])
    assert kaplan_meier(finished, censored) == pytest.approx([2, 0, 2, 6, 0])
    assert kaplan_meier(np.zeros(3), np.array([1.0, 1, 1])) == pytest.approx([0, 0, 3])


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_a_life_table_without_late_entry_is_the_estimate_of_kaplan_and_meier(finished):
    ended, count = np.array(finished), len(finished)
    table = life_table(np.full(count, -np.inf), np.arange(count, dtype=float), ended)
    surviving = outliving(ended, np.arange(count, 0, -1))
    weights = kaplan_meier(ended.astype(float), (~ended).astype(float)) / count
    assert table.unseen == pytest.approx(surviving[-1])
    assert table.weights[: ended.sum()] == pytest.approx(weights[ended], abs=1e-12)


def test_quantiles_lie_between_neighbours():
    evenly = Distribution(np.array([1.0, 2.0, 3.0]), np.full(3, 1 / 3), 3, 0.0)
    assert evenly.at(np.array([0.0, 0.25, 1.0])) == pytest.approx([1, 1.5, 3])
