"""Accuracy as the literature counts it: how often a predictor names the right bucket of length.

S3 (arXiv 2306.06000) cuts lengths into ten buckets of equal width up to 2,048 tokens and
counts a prediction as right if it falls into the bucket of the length. What that says depends
on where the limits are, so three ways to set them stand side by side, each with the score of
always naming the commonest bucket, and with what a bucket is for: how many answers fit into
the one that was named, and how much was reserved for what was used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from odma_service._native import optimal_limits

BUCKETS = 10
S3_LENGTH_TOKENS = 2_048
NARROW_LENGTH_TOKENS = 512
MOST_BINS = 4_096  # of optimal_limits

Integers = NDArray[np.int64]


class Predicted(NamedTuple):
    """A set: lengths that limits are set by, lengths to score, and quantiles for the latter."""

    name: str
    model_version: str
    known_tokens: Integers
    actual_tokens: Integers
    median_tokens: NDArray[np.float64]
    upper_tokens: NDArray[np.float64]  # the 95 % quantile


def limits_by(known: Integers) -> dict[str, Integers]:
    """Return three kinds of limits, and narrow ones of equal width, from lengths seen before."""
    most = max(int(known.max()), 1)
    shares = np.quantile(known, np.arange(1, BUCKETS + 1) / BUCKETS, method="higher")
    lengths, weights = np.unique(np.maximum(known, 1), return_counts=True)
    if len(lengths) > MOST_BINS:  # coarser bins of equal mass; the greatest length stays
        places = np.linspace(0, len(lengths) - 1, MOST_BINS).astype(int)
        weights = np.diff(np.concatenate([[0], np.cumsum(weights)[places]]))
        lengths = lengths[places]
    best, _ = optimal_limits(weights.astype(np.float64), lengths.astype(np.uint32), BUCKETS)
    return {
        f"equal width to {S3_LENGTH_TOKENS:,}": _equal_width(S3_LENGTH_TOKENS, most),
        f"equal width to {NARROW_LENGTH_TOKENS}": _equal_width(NARROW_LENGTH_TOKENS, most),
        "equal mass": np.unique(np.maximum(shares, 1)).astype(np.int64),
        "optimal": np.array(best, np.int64),
    }


def _equal_width(length: int, most: int) -> Integers:
    """Return ten limits of equal width; the last one holds what is longer, too."""
    limits = np.ceil(np.arange(1, BUCKETS + 1) * length / BUCKETS).astype(np.int64)
    limits[-1] = max(limits[-1], most)
    return limits


def accuracies(predicted: Predicted) -> Iterator[dict[str, Any]]:
    """Score a set under each kind of limits.

    `accuracy` is S3's, of the bucket of the median; `majority` that of the bucket that was
    commonest among the known lengths. Coverage: answers that fit into the bucket named.
    """
    known, actual = predicted.known_tokens, predicted.actual_tokens
    for kind, limits in limits_by(known).items():
        truth, named = _bucket(limits, actual), _bucket(limits, predicted.median_tokens)
        upper = _bucket(limits, predicted.upper_tokens)
        commonest = np.bincount(_bucket(limits, known), minlength=len(limits)).argmax()
        yield {
            "set": predicted.name,
            "model": predicted.model_version,
            "rows": len(actual),
            "limits": kind,
            "limits_tokens": limits.tolist(),
            "majority": round(float((truth == commonest).mean()), 4),
            "accuracy": round(float((truth == named).mean()), 4),
            "coverage_median": round(float((actual <= limits[named]).mean()), 4),
            "reserved_median": round(float(limits[named].sum() / actual.sum()), 3),
            "coverage_95": round(float((actual <= limits[upper]).mean()), 4),
            "reserved_95": round(float(limits[upper].sum() / actual.sum()), 3),
        }


def _bucket(limits: Integers, tokens: NDArray[Any]) -> Integers:
    """Return the number of the smallest limit that holds each length; the last holds the rest."""
    places: Integers = np.searchsorted(limits, np.ceil(tokens))
    return np.minimum(places, len(limits) - 1)


def accuracy_lines(sets: Sequence[Predicted]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return a section of the report, and its rows."""
    rows = [row for predicted in sets for row in accuracies(predicted)]
    if not rows:
        return ["## Predictor accuracy", "", "Not measured: no sets of prompts.", ""], rows
    lines = [
        "## Predictor accuracy",
        "",
        _heading(rows[0]["model"]),
        "",
        "| set | buckets | majority | accuracy | covered | reserved | covered by q95 | reserved |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row['set']} | {row['limits']} | {row['majority']:.1%} | {row['accuracy']:.1%}"
            f" | {row['coverage_median']:.1%} | {row['reserved_median']:.2f}"
            f" | {row['coverage_95']:.1%} | {row['reserved_95']:.2f} |"
            for row in rows
        ),
        "",
        *_meaning(rows),
    ]
    return lines, rows


def _heading(model: str) -> str:
    return (
        f"Ten buckets, limits from training rows; model {model}, trained as its card says, history"
        " running 64 rows late. A prediction is right if it names the bucket of the length (S3's"
        " score); `majority` always names the commonest one. Covered: the answer fits into the"
        " bucket named, by the median and by the 95 % quantile. Reserved: over actual tokens."
    )


def _meaning(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Say what the paper's scores can mean, in the figures above."""
    apart = {
        name: [row["accuracy"] for row in rows if row["set"] == name]
        for name in dict.fromkeys(row["set"] for row in rows)
    }
    widest = max(apart, key=lambda name: max(apart[name]) - min(apart[name]))
    wide = [row for row in rows if row["limits"].endswith(f"{S3_LENGTH_TOKENS:,}")]
    easiest = max(wide, key=lambda row: row["majority"])
    yield (
        f"On {easiest['set']} the commonest of ten buckets up to 2,048 tokens is right for"
        f" {easiest['majority']:.1%} without looking at a prompt. The same model scores from"
        f" {min(apart[widest]):.1%} to {max(apart[widest]):.1%} on {widest}, by the limits alone."
    )
    yield ""
    yield (
        "The paper's 98.60 -> 99.55 % (Alpaca) and 82.68 -> 93.36 % (Google NQ) are such scores."
        " They can mean that most answers fall into few buckets; without limits, majority score"
        " and answers they cannot mean that lengths are known, nor that one predictor is better"
        " than another whose buckets had other limits: ODMA's limits adapt, S3's do not. They are"
        " not reproduced here: the answers of DeepSeek-R1-Distill-Qwen-7B were not there, and the"
        " NQ set here holds short human answers. Coverage beside reserved/actual is what memory"
        " management lives on, and is what we go by."
    )
    yield ""
