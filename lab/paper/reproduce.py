"""The paper's tables, and what its reviewers asked for, as one report in Markdown.

The paper (arXiv 2512.09427) compares static reservation, S3 and ODMA on a Cambricon card with
prompts of Alpaca and Google NQ answered by DeepSeek-R1-Distill-Qwen-7B. Neither the card nor
those answers are here: the loads are log-normal ones with the shape of such sets, and time is
simulated. So ratios can be looked at side by side; absolute figures cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lab.paper.bucket_accuracy import Predicted, accuracy_lines
from odma_service.replay.compare import Comparison, Setting, as_object, compare, run_policy
from odma_service.replay.load import limits_for, load_of
from odma_service.replay.measure import interval, measure, window_of
from odma_service.replay.policies import IDEAL, Parameters, Tuning
from odma_service.replay.report import with_interval
from odma_service.traces import Trace, generate

POLICIES = ("static", "s3", "odma", "elastic", "oracle", "paged-16", "paged-64")
CAPACITY_TOKENS = 111_000
MODEL_LENGTH_TOKENS = 16_384

Say = Callable[[str], None]


class Shape(NamedTuple):
    """A log-normal load: medians in tokens."""

    name: str
    input_median: float
    input_sigma: float
    output_median: float
    output_sigma: float
    max_output_tokens: int


SHAPES = (
    Shape("instruction-like", 21, 0.85, 286, 1.07, 2_048),
    Shape("question-like", 10, 0.2, 150, 0.9, 2_048),
    Shape("reasoning-like", 120, 0.7, 700, 1.0, 14_384),
)

PAPER = (
    ("KV utilisation, Alpaca", "55.05 % (static) -> 72.45 % (ODMA)"),
    ("KV utilisation, Google NQ", "42.54 % (static) -> 61.79 % (ODMA)"),
    ("tokens per second, ODMA over static", "+23 % to +27 %"),
    ("predictor accuracy, Alpaca", "98.60 % (S3) -> 99.55 % (ODMA)"),
    ("predictor accuracy, Google NQ", "82.68 % (S3) -> 93.36 % (ODMA)"),
)

DIFFERENCES = (
    (
        "The card was not there. Time is a model: weights, KV bytes, FLOPs, copies; efficiencies"
        " are assumptions."
    ),
    (
        "The model's answers were not there: loads have the shape of such sets, not their"
        " texts. So in these loads `odma`"
        " predicts from live histograms, `s3` from the true length with a log-normal error of"
        " sigma 0.5."
    ),
    (
        "The paper's static maximum, arrivals, batch cap, number of runs and definition of"
        " utilisation are not published. Both definitions are printed, and static by its maximum."
    ),
    (
        "`odma` here is a reading of the paper: limits are lengths, regions are not taken from"
        " fixed lists, an overflow copies into any hole that is large enough."
    ),
    "Paging with 16 and 64 tokens a page stands beside them, which the paper leaves out.",
)

SENSITIVITY: tuple[tuple[str, Parameters], ...] = (
    ("as tuned", {}),
    ("4 buckets", {"buckets": 4}),
    ("8 buckets", {"buckets": 8}),
    ("16 buckets", {"buckets": 16}),
    ("doubling limits, never changed", {"learns": 0}),
    ("equal-width limits, never changed", {"learns": 0, "equal_width": 1}),
    ("safety share 0", {"safety_share": 0.0}),
    ("safety share 0.05", {"safety_share": 0.05}),
    ("safety share 0.2", {"safety_share": 0.2}),
    # A risk that is none of learning.expected.RISKS stays.
    ("overflow risk held at 0.11", {"overflow_risk": 0.11}),
    ("overflow risk held at 0.31", {"overflow_risk": 0.31}),
    ("overflow risk held at 0.71", {"overflow_risk": 0.71}),
    ("unsure from q95/q50 of 2", {"unsure_ratio": 2.0}),
    ("nobody unsure", {"unsure_ratio": 0.0}),
)


def shaped(shape: Shape, rows: int, seed: int) -> Trace:
    """Return a load of that shape."""
    random = np.random.default_rng((seed, 77))
    inputs = np.rint(random.lognormal(np.log(shape.input_median), shape.input_sigma, rows))
    outputs = np.rint(random.lognormal(np.log(shape.output_median), shape.output_sigma, rows))
    return Trace(
        np.cumsum(random.exponential(1.0, rows)),
        inputs.clip(1, 8_192).astype(np.int64),
        outputs.clip(1, shape.max_output_tokens).astype(np.int64),
        f"{shape.name} seed={seed}",
    )


def reproduce(
    rows: int,
    seeds: int,
    drifting: Sequence[Trace],
    tuning: Tuning,
    directory: Path,
    recalibration_ms: float,
    predicted: Sequence[Predicted],
    say: Say,
) -> tuple[str, dict[str, Any]]:
    """Return the report, as Markdown and as an object."""
    compared = []
    for shape in SHAPES:
        say(shape.name)
        trace = shaped(shape, rows, 1)
        limits = limits_for(trace, CAPACITY_TOKENS, shape.max_output_tokens, MODEL_LENGTH_TOKENS)
        compared.append(compare(trace, POLICIES, Setting(limits, seeds=seeds), tuning, directory))
    for trace in drifting:
        say(trace.label)
        setting = Setting(limits_for(trace, CAPACITY_TOKENS))
        compared.append(compare(trace, POLICIES, setting, tuning, directory))
    say("static sizing")
    sizing = list(_static_sizing(rows, tuning, directory))
    say("sensitivity")
    sensitive = list(_sensitivity(rows, tuning, directory))
    accuracy, accurate = accuracy_lines(predicted)
    objects = [as_object(comparison) for comparison in compared]
    lines = [
        "# The paper's tables, again",
        "",
        *_preface(tuning, seeds),
        *(line for comparison in compared for line in _utilisation(comparison)),
        *_sizing_lines(sizing),
        *_learning_lines(compared, recalibration_ms),
        *_sensitivity_lines(sensitive),
        *accuracy,
        *_differences(),
    ]
    facts = {
        "loads": objects,
        "static_sizing": sizing,
        "sensitivity": sensitive,
        "accuracy": accurate,
        "recalibration_ms": recalibration_ms,
        "parameter_hash": tuning.digest,
    }
    return "\n".join(lines) + "\n", facts


def _preface(tuning: Tuning, seeds: int) -> Iterator[str]:
    yield (
        f"{seeds} seeds for each made load (one for a drifting trace): the first as made, the"
        " others reordered in blocks; ± is half of a 95 % confidence interval (Student's t),"
        " ratios are paired by seed. Closed loop, batch cap 256, whole prefill, preemption by"
        f" recompute, no prefix reuse. Parameters {tuning.digest}, tuned on other loads."
    )
    yield ""
    yield "What the paper reports:"
    yield ""
    yield from (f"* {name}: {figure}" for name, figure in PAPER)
    yield ""


def _utilisation(comparison: Comparison) -> Iterator[str]:
    facts = as_object(comparison)
    yield f"## {comparison.label}: {facts['load_class']}"
    yield ""
    yield (
        f"{facts['requests']:,} requests, maximum min(input + {facts['max_output_tokens']:,},"
        f" {facts['model_length_tokens']:,}); an unlimited pool gives"
        f" {facts['unlimited_over_ideal_paging']:.2f} x ideal paging."
    )
    yield ""
    yield "| policy | tokens/s | over static | differs | written/capacity | written/reserved |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, row in facts["policies"].items():
        ratio = comparison.ratio(name, "static")
        differs = "one run" if ratio.half is None else "no"
        if ratio.half is not None and abs(ratio.mean - 1) > ratio.half:
            differs = "yes"
        yield (
            f"| {name} | {with_interval(row['tokens_per_s'], row['tokens_per_s_ci95'], 1)}"
            f" | {with_interval(ratio.mean, ratio.half, 3)} | {differs}"
            f" | {row['utilisation_written_over_capacity']:.1%}"
            f" | {row['utilisation_written_over_reserved']:.1%} |"
        )
    yield ""


def _static_sizing(rows: int, tuning: Tuning, directory: Path) -> Iterator[dict[str, Any]]:
    """How much static reservation depends on what answers are allowed to be."""
    trace = shaped(SHAPES[0], rows, 2)
    for most in (512, 1_024, 2_048, 4_096, 8_192):
        limits = limits_for(trace, CAPACITY_TOKENS, most, MODEL_LENGTH_TOKENS)
        comparison = compare(
            trace, ("static", "odma", "elastic"), Setting(limits), tuning, directory
        )
        policies = as_object(comparison)["policies"]
        yield {
            "max_output_tokens": most,
            "static_written_over_capacity": policies["static"]["utilisation_written_over_capacity"],
            "static_written_over_reserved": policies["static"]["utilisation_written_over_reserved"],
            "odma_over_static": round(comparison.ratio("odma", "static").mean, 4),
            "elastic_over_static": round(comparison.ratio("elastic", "static").mean, 4),
        }


def _sizing_lines(sizing: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "## How static was sized"
    yield ""
    yield (
        "The paper does not say what its worst case was, and everything against static hangs on"
        " it. The instruction-like load, by the most an answer may have:"
    )
    yield ""
    yield "| max output | written/capacity | written/reserved | odma/static | elastic/static |"
    yield "| --- | --- | --- | --- | --- |"
    for row in sizing:
        yield (
            f"| {row['max_output_tokens']:,} | {row['static_written_over_capacity']:.1%}"
            f" | {row['static_written_over_reserved']:.1%} | {row['odma_over_static']:.2f}"
            f" | {row['elastic_over_static']:.2f} |"
        )
    yield ""


def _learning_lines(compared: Sequence[Comparison], recalibration_ms: float) -> Iterator[str]:
    yield "## Safety pool, limits and copies"
    yield ""
    yield (
        f"Finding 16 limits over 512 bins takes {recalibration_ms:.2f} ms. Changing limits moves"
        " no memory: they are lengths, not places. Copies are of regions that outgrow theirs."
    )
    yield ""
    yield (
        "| load | policy | hits: growth | hits: unsure | recalibrations | per 1,000 requests"
        " | preemptions | copies | share of time |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for comparison in compared:
        for name in ("odma", "elastic"):
            row = as_object(comparison)["policies"][name]
            often = row["recalibrations"] / comparison.requests * 1_000
            yield (
                f"| {comparison.label} | {name} | {row['safety_hits_growth']:,.0f}"
                f" | {row['safety_hits_unsure']:,.0f} | {row['recalibrations']:,.1f} | {often:.1f}"
                f" | {row['preemptions']:,.0f} | {row['copies']:,.0f}"
                f" | {row['copy_share_of_time']:.2%} |"
            )
    yield ""


def _sensitivity(rows: int, tuning: Tuning, directory: Path) -> Iterator[dict[str, Any]]:
    """ODMA under other parameters, on a load that drifts and shifts."""
    trace = generate(rows, 9)
    setting = Setting(limits_for(trace, CAPACITY_TOKENS // 2))
    load = load_of(trace, setting.limits)
    outputs = [request.output_tokens for request in load.requests]
    base = run_policy(IDEAL, load, setting, tuning, directory)
    for name, changes in SENSITIVITY:
        tried = replace(tuning, parameters={"odma": {**tuning.of("odma"), **changes}})
        run = run_policy("odma", load, setting, tried, directory)
        window = window_of((base.history, run.history))
        ours, ideal = (
            measure(each.history, window, setting.limits.capacity_tokens, outputs)
            for each in (run, base)
        )
        yield {
            "variant": name,
            "over_ideal_paging": round(ours.tokens_per_s / ideal.tokens_per_s, 4),
            "written_over_reserved": round(ours.utilisation_written_over_reserved, 4),
            "preemptions": ours.preemptions,
            "copies": ours.copies,
            "copy_share_of_time": round(ours.copy_share_of_time, 5),
            "recalibrations": run.safety.recalibrations,
            "safety_hits_growth": run.safety.growth,
            "safety_hits_unsure": run.safety.unsure,
        }


def _sensitivity_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "## Sensitivity of odma, on a load that drifts and then shifts"
    yield ""
    yield (
        "Half a pool, three classes whose mix changes. The window of the histograms (half-life"
        " 512 completions) is fixed in C and was not varied."
    )
    yield ""
    yield (
        "| variant | of ideal paging | written/reserved | preemptions | copies | of time"
        " | recalibrations | hits: growth | unsure |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        yield (
            f"| {row['variant']} | {row['over_ideal_paging']:.3f}"
            f" | {row['written_over_reserved']:.1%} | {row['preemptions']:,}"
            f" | {row['copies']:,} | {row['copy_share_of_time']:.3%} | {row['recalibrations']}"
            f" | {row['safety_hits_growth']:,} | {row['safety_hits_unsure']:,} |"
        )
    scores = [row["over_ideal_paging"] for row in rows]
    yield ""
    yield f"Over all variants: {interval(scores).mean:.3f} on average, {min(scores):.3f} at least."
    yield ""


def _differences() -> Iterator[str]:
    yield "## What differs from the paper, and what cannot be compared"
    yield ""
    yield from (f"* {sentence}" for sentence in DIFFERENCES)
