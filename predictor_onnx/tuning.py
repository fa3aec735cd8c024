"""Tuning: a model that is served learns on from a deployment's own decision logs.

Only what comes after the embeddings learns, and no further from where it was than pays: there
are thousands of rows, not hundreds of thousands. Time parts the rows. On the first part the
network learns; on the second, which it has not seen, how far it learns and how far it is to be
trusted; the last part is looked at once, to compare it with the model it was made from.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from odma_service._native.features import GROUPS, STATS
from odma_service.errors import InvalidError
from odma_service.learning.predictor import RESEARCH, WINDOW, Predictor, PromptInput
from odma_service.learning.survival import LEVELS
from predictor_onnx.decisions import Doubles, Seen, read_logs
from predictor_onnx.evaluate import SLACK
from predictor_onnx.export import TEXTS, export
from predictor_onnx.graph import trained_in
from predictor_onnx.network import Inputs, Own, Scale, Weights, own, trusted
from predictor_onnx.rows import Floats, Integers, histories, summarise
from predictor_onnx.train import Say, Trained

LEAST_ROWS = 500
"""Of the log, to part in three."""
LEARNT, JUDGED = 0.56, 0.8
"""Shares of the rows, by time: to here the network learns, to here it is weighed; then it is
compared."""
BLOCK = 50
"""Neighbours in time share a history: they are drawn together when chance is judged."""
DRAWS = 2_000
SURE = 0.975


@dataclass(frozen=True, slots=True)
class Tuning:
    """How to learn on. Shares are of rows, drawn anew for each step."""

    steps: int = 1_500
    looks: int = 15
    batch: int = 256
    rate: float = 1e-3
    weight_decay: float = 1e-4
    anchor: float = 1e-4  # of the squared distance from the model that it was made from
    text_dropped: float = 0.1
    history_dropped: float = 0.05
    history_short: float = 0.3
    trust_steps: int = 600
    regret: float = 1.0


class Comparison(NamedTuple):
    """Mean pinball losses of log lengths on the last rows; `surely`: the gain, less chance."""

    rows: int
    before: float
    after: float
    window: float
    surely: float
    coverage_95_before: float
    coverage_95_after: float

    @property
    def better(self) -> bool:
        """Whether more than chance speaks for the new model."""
        return self.surely > 0


def tune(
    files: Sequence[Path], base: Path, out: Path, name: str, seed: int, tuning: Tuning, say: Say
) -> tuple[Comparison, Predictor | None]:
    """Learn on from logs; write a model directory to `out` only if it is better.

    Raises InvalidError for logs that are too short or make no sense.
    """
    model = Predictor.load(base)
    rows, facts = read_logs(files, model)
    say(_counted(facts))
    if len(rows) < LEAST_ROWS:
        raise InvalidError("log", f"{len(rows):,} requests to learn from, {LEAST_ROWS:,} at least")
    if model.non_commercial and not name.startswith(RESEARCH):
        name = f"{RESEARCH}{name}"
    parts = _by_time(rows)
    first, second, last = map(rows.take, parts)
    stored, scale = trained_in((base / "model.onnx").read_bytes())
    before = {key: jnp.asarray(value) for key, value in stored.items()}
    weights, steps = _learn(before, scale, first, second, tuning, seed, say)
    trust = _trust(weights, scale, second, tuning, seed)
    both = rows.take(np.concatenate(parts[:2]))
    after = before
    if steps:
        after, _ = _learn(before, scale, both, None, tuning, seed, say, steps)
    after = after | trust
    compared = _compare(before, after, scale, last, seed)
    if not compared.better:
        return compared, None
    table, row_of = model.embeddings
    trained = Trained(after, table, row_of, scale)
    served, _ = export(trained, out, name, _examples(last))
    card = _card(served.version, model.version, base, facts, tuning, seed, steps, compared)
    (out / "card.md").write_text(card)
    return compared, Predictor.load(out)


def _by_time(rows: Seen) -> list[Integers]:
    """Part rows by when they were asked for; what had not ended when a part did is in none."""
    ends = [rows.asked[int(share * len(rows))] for share in (LEARNT, JUDGED)]
    first = (rows.asked < ends[0]) & (rows.ended < ends[0])
    second = (rows.asked >= ends[0]) & (rows.asked < ends[1]) & (rows.ended < ends[1])
    parts = [np.flatnonzero(part) for part in (first, second, rows.asked >= ends[1])]
    if min(map(len, parts)) < LEAST_ROWS // 10:
        raise InvalidError("log", "too few requests had ended before others were asked for")
    return parts


def _inputs(features: Floats, text: Floats, history: Floats) -> Inputs:
    pooled, known, stats = np.split(features, [features.shape[1] - STATS - GROUPS, -STATS], 1)
    return Inputs(pooled, known, stats, text[:, None], history)


def _batch(rows: Seen, tuning: Tuning, random: np.random.Generator) -> tuple[Inputs, Seen]:
    """Draw rows, some without their text and some with less of their history."""
    drawn = rows.take(random.integers(len(rows), size=tuning.batch))
    kind, n = random.random(tuning.batch), tuning.batch
    fewer = (np.exp(random.random(n) * np.log(WINDOW))).astype(np.int64)
    counts = np.where(kind < tuning.history_short, np.minimum(fewer, drawn.counts), drawn.counts)
    counts[kind < tuning.history_dropped] = 0
    blind = random.random(n) < tuning.text_dropped
    features = drawn.features.copy()
    features[blind, :-STATS] = 0
    features[blind, 1 - STATS :] = 0
    text = np.where(blind, 0, drawn.text).astype(np.float32)
    latest = drawn.counts - counts  # a shorter window has the later ones
    places = np.minimum(np.arange(WINDOW) + latest[:, None], WINDOW - 1)
    windows = np.take_along_axis(drawn.windows, places, 1)
    return _inputs(features, text, summarise(windows, counts)), drawn


def _losses(quantiles: Any, logs: Any, limits: Any) -> Any:
    """Return the pinball loss of each row; what is said beyond a limit cannot be judged.

    Powell, Censored regression quantiles, J. of Econometrics 1986.
    """
    missed = jnp.asarray(logs)[:, None] - jnp.minimum(quantiles, jnp.asarray(limits)[:, None])
    return jnp.maximum(LEVELS * missed, (LEVELS - 1) * missed).mean(1)


def _learn(
    start: Weights,
    scale: Scale,
    rows: Seen,
    judged: Seen | None,
    tuning: Tuning,
    seed: int,
    say: Say,
    steps: int = 0,
) -> tuple[Weights, int]:
    """Return weights, and after how many steps; 0: none was better on the rows to judge by.

    Without such rows, the weights after `steps`.
    """
    random = np.random.default_rng((seed, 3))
    schedule = optax.cosine_decay_schedule(tuning.rate, tuning.steps)
    moves = optax.adamw(schedule, weight_decay=tuning.weight_decay)

    @jax.jit
    def step(weights: Weights, state: Any, batch: Any, key: Any) -> Any:
        def loss(weights: Weights) -> Any:
            inputs, logs, limits = batch
            said = own(weights, scale, inputs, key).quantiles
            moved = jax.tree.map(lambda now, then: ((now - then) ** 2).sum(), weights, start)
            return _losses(said, logs, limits).mean() + tuning.anchor * sum(moved.values())

        changes, state = moves.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, changes), state

    weights, state, key = start, moves.init(start), jax.random.PRNGKey(seed)
    best, chosen, found = np.inf, 0, start
    if judged is not None:
        best = _own_loss(start, scale, judged)
        say(f"step 0: loss {best:.4f} on rows not learnt from")
    for number in range(1, (steps or tuning.steps) + 1):
        inputs, drawn = _batch(rows, tuning, random)
        key, dropping = jax.random.split(key)
        weights, state = step(weights, state, (inputs, drawn.logs, drawn.limits), dropping)
        if judged is not None and number % (tuning.steps // tuning.looks) == 0:
            lost = _own_loss(weights, scale, judged)
            say(f"step {number}: loss {lost:.4f}")
            if lost < best:
                best, chosen, found = lost, number, weights
    return (weights, steps) if judged is None else (found, chosen)


def _own_loss(weights: Weights, scale: Scale, rows: Seen) -> float:
    said = own(weights, scale, _inputs(rows.features, rows.text, rows.history))
    return float(_losses(said.quantiles, rows.logs, rows.limits).mean())


def _trust(weights: Weights, scale: Scale, rows: Seen, tuning: Tuning, seed: int) -> Weights:
    """Return what weighs the network against the window, learnt on what it has not seen."""
    random, says = np.random.default_rng((seed, 4)), jax.jit(own)
    start = {key: each for key, each in weights.items() if key.startswith(("past", "trust"))}
    moves = optax.adam(optax.cosine_decay_schedule(tuning.rate, tuning.trust_steps))

    @jax.jit
    def step(trust: Weights, state: Any, said: Own, logs: Any, limits: Any) -> Any:
        def loss(trust: Weights) -> Any:
            lost = _losses(trusted(trust, said), logs, limits)
            regretted = jax.nn.relu(lost - _losses(said.window, logs, limits))
            moved = jax.tree.map(lambda now, then: ((now - then) ** 2).sum(), trust, start)
            return (lost + tuning.regret * regretted).mean() + tuning.anchor * sum(moved.values())

        changes, state = moves.update(jax.grad(loss)(trust), state, trust)
        return optax.apply_updates(trust, changes), state

    trust, state = start, moves.init(start)
    for _ in range(tuning.trust_steps):
        inputs, drawn = _batch(rows, tuning, random)
        trust, state = step(trust, state, says(weights, scale, inputs), drawn.logs, drawn.limits)
    return trust


def _compare(before: Weights, after: Weights, scale: Scale, rows: Seen, seed: int) -> Comparison:
    losses, covered = [], []
    inputs = _inputs(rows.features, rows.text, rows.history)
    for weights in (before, after):
        said = own(weights, scale, inputs)
        quantiles = np.asarray(trusted(weights, said))
        losses.append(np.asarray(_losses(quantiles, rows.logs, rows.limits), np.float64))
        within = quantiles[:, 5] >= rows.logs - SLACK
        covered.append(float(within[rows.logs < rows.limits].mean()))
    window = float(_losses(said.window, rows.logs, rows.limits).mean())
    old, new = losses
    return Comparison(
        len(rows),
        float(old.mean()),
        float(new.mean()),
        window,
        _least_gain(old - new, seed),
        *covered,
    )


def _least_gain(gains: Doubles, seed: int) -> float:
    """Return the mean that SURE of all samples of these gains pass, neighbours drawn together."""
    blocks = np.array_split(gains, max(len(gains) // BLOCK, 2))
    sums, sizes = np.array([block.sum() for block in blocks]), np.array([*map(len, blocks)])
    drawn = np.random.default_rng((seed, 5)).integers(len(blocks), size=(DRAWS, len(blocks)))
    return float(np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), 1 - SURE))


def _examples(rows: Seen) -> list[PromptInput]:
    """Return prompts to prove an export on: real histories, and texts of our own."""
    few = np.linspace(0, len(rows) - 1, 200).astype(int)
    pasts = histories(rows.take(few).history)
    tokens = np.expm1(rows.features[few, -STATS]).round().astype(int).tolist()
    texts = [TEXTS[i % len(TEXTS)] for i in range(len(few))]
    return [PromptInput(*prompt) for prompt in zip(texts, tokens, pasts, strict=True)]


def _counted(facts: dict[str, int]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in facts.items())


def _card(
    version: str,
    parent: str,
    base: Path,
    facts: dict[str, int],
    tuning: Tuning,
    seed: int,
    steps: int,
    compared: Comparison,
) -> str:
    recipe = ", ".join(f"{key} {value}" for key, value in asdict(tuning).items())
    counted = _counted(facts)
    old, new = compared.coverage_95_before, compared.coverage_95_after
    return f"""# {version}

Made on {dt.datetime.now(dt.UTC).date().isoformat()} from {parent}, whose card follows below.

**Data.** This deployment's own decision log: no texts, and no data of anybody else. In it:
{counted}.

Seed {seed}; {steps} steps were best; {recipe}.

## Figures

On the last {compared.rows:,} requests by time, which took no part in training; pinball loss of
log lengths, answers at their limit known to be at least so long.

| | pinball | coverage of q95 |
| --- | --- | --- |
| {parent} | {compared.before:.4f} | {old:.3f} |
| {version} | {compared.after:.4f} | {new:.3f} |
| the window alone | {compared.window:.4f} | |

The gain is {compared.before - compared.after:.4f}; with 97.5 % confidence at least
{compared.surely:.4f}.

---

{(base / "card.md").read_text()}"""
