"""The network: pooled words, statistics and a history in, seven ascending quantiles out.

It has two parts. `own` is the network proper: all it says is relative to the history, whose
mean is where the median starts from and whose spread is the unit of what is added, so a level
that shifts moves all quantiles at once. `trusted` then weighs that against the window's own
quantiles, mended for chance: small networks that were trained on prompts and tasks which the
first had not seen, for on what it knows it always looks good.

    pooled (GROUPS x DIMS), known (GROUPS)    embeddings' means, and shares of ids known
    stats (STATS)                             of which all but the first need a text
    text (1)                                  whether there is one
    history (10)                              mean, sd, seven quantiles, count; log lengths
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from odma_service._native.features import GROUPS, STATS
from odma_service.learning.predictor import WINDOW

DIMS = 32
HISTORY = 10
HIDDEN = 128
LEAST_SPREAD = 0.15
CLIP = 6.0
INPUTS = GROUPS * DIMS + GROUPS + STATS + 1 + HISTORY + 1
SIGNS = 2 * GROUPS + 8
PAST = 10
DOUBT = 24

Weights = dict[str, jax.Array]


class Scale(NamedTuple):
    """What does not train: how statistics are standardised, and what is usual without history."""

    stats_mean: np.ndarray  # STATS
    stats_sd: np.ndarray
    wide: np.ndarray  # seven log lengths
    wide_mean: float
    wide_sd: float


class Inputs(NamedTuple):
    """What the network sees of rows; see the module."""

    pooled: ArrayLike
    known: ArrayLike
    stats: ArrayLike
    text: ArrayLike
    history: ArrayLike


class Own(NamedTuple):
    """What the network proper says, what the window does, and signs of which to trust."""

    quantiles: Any  # seven
    window: Any  # seven
    spread: Any
    past: Any  # PAST: what the window looks like
    signs: Any  # SIGNS


def initial(seed: int) -> Weights:
    """Return weights of the network proper to start from, without the embeddings."""
    weights = _layers(jax.random.PRNGKey(seed), "w", (INPUTS, HIDDEN, HIDDEN, 7))
    weights["norm_scale"], weights["norm_shift"] = jnp.ones(GROUPS * DIMS), jnp.zeros(GROUPS * DIMS)
    return weights


def initial_trust(seed: int) -> Weights:
    """Return weights to start from for `trusted`."""
    first, second = jax.random.split(jax.random.PRNGKey(seed))
    past = _layers(first, "past", (PAST, DOUBT, 13))
    return past | _layers(second, "trust", (SIGNS, DOUBT, 3))


def _layers(key: jax.Array, name: str, sizes: tuple[int, ...]) -> Weights:
    """Return dense layers; the last one starts near 0."""
    weights: Weights = {}
    for i, (fan, out) in enumerate(pairwise(sizes)):
        key, used = jax.random.split(key)
        gain = 2.0 if i < len(sizes) - 2 else 0.1
        weights[f"{name}{i}"] = jax.random.normal(used, (fan, out)) * (gain / fan) ** 0.5
        weights[f"{name}{i}_bias"] = jnp.zeros(out)
    return weights


def own(weights: Weights, scale: Scale, inputs: Inputs, dropout: jax.Array | None = None) -> Own:
    """Return what the network proper says. `dropout`: a key, while training."""
    pooled, known, stats, text, history = map(jnp.asarray, inputs)
    count = history[:, 9:]
    told = (count > 0).astype(jnp.float32)
    mean = jnp.where(count > 0, history[:, :1], scale.wide_mean)
    spread = jnp.where(count > 0, jnp.maximum(history[:, 1:2], LEAST_SPREAD), scale.wide_sd)
    window = jnp.where(count > 0, history[:, 2:9], scale.wide)
    standard = jnp.clip((stats - scale.stats_mean) / scale.stats_sd, -CLIP, CLIP)
    tokens, experience = standard[:, :1], jnp.log1p(count) / float(np.log1p(WINDOW))
    level, log_spread = (mean - scale.wide_mean) * told, jnp.log(spread) * told
    shape = (window - mean) / spread * told
    parts = [_normalised(weights, pooled) * text, known, tokens, standard[:, 1:] * text]
    past = [log_spread, shape, experience, told]
    parts += [text, level, *past]
    hidden = jnp.concatenate(parts, 1)
    for i in range(2):
        hidden = jax.nn.relu(hidden @ weights[f"w{i}"] + weights[f"w{i}_bias"])
        if dropout is not None:
            dropout, key = jax.random.split(dropout)
            hidden = hidden * jax.random.bernoulli(key, 0.7, hidden.shape) / 0.7
    out = hidden @ weights["w2"] + weights["w2_bias"]
    middle = mean + out[:, 2:3] * spread
    gaps = jax.nn.softplus(jnp.concatenate([out[:, :2], out[:, 3:]], 1)) * spread
    said = _around(middle, gaps)
    ratio = (said[:, 4:5] - said[:, :1]) / (window[:, 4:5] - window[:, :1] + 0.1 * spread)
    moved = jnp.clip((middle - window[:, 2:3]) / spread, -4, 4)
    norms = jnp.sqrt((pooled**2).reshape(-1, GROUPS, DIMS).mean(2) + 1e-4)
    signs = [known, jnp.log(norms) * text, moved, jnp.abs(moved), jnp.log(ratio + 0.05)]
    signs += [experience, told, log_spread, text, tokens]
    return Own(said, window, spread, jnp.concatenate(past, 1), jnp.concatenate(signs, 1))


def trusted(weights: Weights, said: Own) -> jax.Array:
    """Return rows of seven log lengths: what the network says as far as it is to be trusted."""
    out = _doubts(weights, "trust", said.signs)
    share = jax.nn.sigmoid(2.0 + out[:, :1])
    wider = jnp.exp(jnp.tanh(out[:, np.array([1, 1, 2, 2, 2, 2])]))
    wide = _around(said.quantiles[:, 2:3], jnp.diff(said.quantiles, axis=1) * wider)
    return jnp.maximum(share * wide + (1 - share) * mended(weights, said), 0.0)


def mended(weights: Weights, said: Own) -> jax.Array:
    """Return the window's quantiles less the chance in them: few lengths say little of tails."""
    out = _doubts(weights, "past", said.past)
    gaps = jnp.diff(said.window, axis=1) * jnp.exp(jnp.tanh(out[:, 1:7]))
    gaps = gaps + jax.nn.softplus(out[:, 7:] - 4.0) * said.spread
    middle = said.window[:, 2:3] + 0.5 * jnp.tanh(out[:, :1]) * said.spread
    return _around(middle, gaps)


def _doubts(weights: Weights, name: str, of: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(of @ weights[f"{name}0"] + weights[f"{name}0_bias"])
    return hidden @ weights[f"{name}1"] + weights[f"{name}1_bias"]


def _around(middle: jax.Array, gaps: jax.Array) -> jax.Array:
    """Return quantiles from a median and the six gaps between them."""
    quarter = middle - gaps[:, 1:2]
    up = middle + jnp.cumsum(gaps[:, 2:], 1)
    return jnp.concatenate([quarter - gaps[:, :1], quarter, middle, up], 1)


def _normalised(weights: Weights, pooled: jax.Array) -> jax.Array:
    centred = pooled - pooled.mean(1, keepdims=True)
    unit = centred / jnp.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    return unit * weights["norm_scale"] + weights["norm_shift"]


def pinball(predicted: jax.Array, actual: ArrayLike, levels: ArrayLike) -> jax.Array:
    """Return the pinball loss of each row of quantiles against its log length."""
    missed = jnp.asarray(actual)[:, None] - predicted
    return jnp.maximum(jnp.asarray(levels) * missed, (jnp.asarray(levels) - 1) * missed).mean(1)
