"""The score of the literature, and what stands beside it."""

from __future__ import annotations

import numpy as np
import pytest

from lab.paper.bucket_accuracy import (
    Predicted,
    accuracies,
    accuracy_lines,
    limits_by,
)


def predicted(known, actual, median, upper):
    arrays = (np.array(known), np.array(actual))
    return Predicted("a set", "a model", *arrays, np.array(median, float), np.array(upper, float))


def test_short_answers_score_in_wide_buckets_without_any_prediction():
    scores = accuracies(predicted([5] * 90 + [700] * 10, [5] * 19 + [700], [100] * 20, [150] * 20))
    wide = next(scores)
    assert wide["limits_tokens"][0] == 205
    assert wide["majority"] == wide["accuracy"] == 0.95
    assert wide["coverage_median"] == 0.95
    assert wide["reserved_median"] == pytest.approx(20 * 205 / (19 * 5 + 700), abs=1e-3)


def test_a_perfect_prediction_is_right_and_covered_everywhere():
    known = np.random.default_rng(1).integers(1, 5_000, 500)
    for row in accuracies(predicted(known, known, known, known)):
        assert row["accuracy"] == row["coverage_median"] == row["coverage_95"] == 1
        assert row["majority"] < 1


def test_limits_hold_every_length_that_was_known():
    known = np.random.default_rng(2).lognormal(6, 1.5, 30_000).astype(int)
    for limits in limits_by(known).values():
        assert len(limits) <= 10
        assert (np.diff(limits) > 0).all()
        assert limits[-1] >= known.max()


def test_the_report_says_what_it_lacks():
    lines, rows = accuracy_lines([])
    assert "Not measured: no sets of prompts." in lines
    assert rows == []
