"""Training: rows in, weights out; the same rows and seed give the same weights.

What matters more than the network is not to learn prompts by heart (a set of 40,000 rows may
have 600 prompts): sets are drawn by the root of their prompts, most ids are dropped at each
step, ids that few prompts have are not kept, embeddings decay. Histories are drawn as a
stream gives them: short and long windows, none, and windows from before a shift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from odma_service._native.features import BUCKETS, GROUPS, NO_ROW, STATS, see
from odma_service.learning.predictor import WINDOW
from odma_service.learning.survival import LEVELS
from predictor_onnx.network import (
    DIMS,
    Inputs,
    Own,
    Scale,
    Weights,
    initial,
    initial_trust,
    own,
    pinball,
    trusted,
)
from predictor_onnx.rows import Floats, Integers, Rows, summarise

SETS = (
    "arena_hard",
    "gpteacher",
    "gsm8k_human",
    "gsm8k_model",
    "reasoning_gym",
    "zeroeval_crux",
    "zeroeval_gsm",
    "zeroeval_math_l5",
)
"""The sets that weights are shipped of: none is non-commercial or share-alike."""

FAMILIES = {"gsm8k_human": "gsm8k", "gsm8k_model": "gsm8k", "zeroeval_gsm": "gsm8k"}
"""Sets with the same prompts: a task is new only if it is in none of them."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. Shares are of rows, drawn anew for each step."""

    steps: int = 4_000
    batch: int = 512
    rate: float = 3e-3
    weight_decay: float = 0.02
    table_decay: float = 0.5
    average: float = 0.995  # of the weights, over steps
    least_prompts: int = 60
    ids_dropped: float = 0.55
    text_dropped: float = 0.1
    history_dropped: float = 0.05
    history_short: float = 0.4
    history_shifted: float = 0.1
    stretched: float = 0.25  # lengths and history, as another model's might be
    power: float = 1.0  # of the root of prompts times the spread of lengths: sets are drawn by it
    folds: int = 4
    fold_steps: int = 1_500
    trust_steps: int = 2_000
    trust_batches: int = 24  # of each fold and kind
    unseen: float = 0.65  # of what trust is learnt on: rows of tasks not seen
    regret: float = 1.0  # that much more counts what is lost against the window


@dataclass(frozen=True, slots=True)
class Trained:
    """A network's weights, the embeddings and which bucket has which."""

    weights: Weights
    table: Floats  # rows x DIMS
    row_of: NDArray[np.uint16]  # BUCKETS
    scale: Scale


class Prompts(NamedTuple):
    """All prompts of the training rows, seen once: ids end to end, three groups a prompt."""

    ids: NDArray[np.uint16]
    starts: Integers  # GROUPS a prompt, and the end
    stats: Floats


def see_all(texts: Sequence[bytes], prompt_tokens: Sequence[int]) -> Prompts:
    """Return prompts as features."""
    seen = [see(text, int(tokens)) for text, tokens in zip(texts, prompt_tokens, strict=True)]
    ids = [group for one in seen for group in one.ids]
    starts = np.concatenate([[0], np.cumsum([len(group) for group in ids])])
    stats = np.array([one.stats for one in seen], np.float32).reshape(-1, STATS)
    return Prompts(np.concatenate([*ids, np.zeros(0, np.uint16)]), starts, stats)


class Data:
    """Training rows of several sets, with their prompts seen."""

    def __init__(self, sets: Sequence[Rows], recipe: Recipe, like: Data | None = None) -> None:
        """Take sets of rows, drawn by the root of their prompts, seen as `like` sees them."""
        self.recipe = recipe
        self.logs = np.concatenate([rows.logs for rows in sets])
        self.lengths = np.array([len(rows) for rows in sets])
        self.first = np.cumsum(self.lengths) - self.lengths
        texts: list[bytes] = []
        tokens: list[int] = []
        prompt, drawn = [], []
        for rows in sets:
            used, where, number = np.unique(rows.prompt, return_index=True, return_inverse=True)
            prompt.append(number + len(texts))
            texts += [rows.prompts[i] for i in used]
            tokens += rows.prompt_tokens[where].tolist()
            drawn.append((len(used) ** 0.5 * rows.logs.std() + 1e-6) ** recipe.power)
        self.prompt = np.concatenate(prompt)
        self.share = np.array(drawn) / sum(drawn)
        self.prompts = see_all(texts, tokens)
        # Rows of the same set and model stand together in `peers`, from `peer` on.
        models = np.concatenate([rows.model + 1_000_000 * i for i, rows in enumerate(sets)])
        _, kind, counts = np.unique(models, return_inverse=True, return_counts=True)
        self.peers = np.argsort(kind, kind="stable")
        self.peer, self.peer_count = (np.cumsum(counts) - counts)[kind], counts[kind]
        if like is None:
            self.row_of, self.known_rows = self._kept()
            self.scale = self._scale()
        else:
            self.row_of, self.known_rows, self.scale = like.row_of, like.known_rows, like.scale
        self.rows = self.row_of[self.prompts.ids]  # of the ids, NO_ROW where it is not known
        found = np.concatenate([[0], np.cumsum(self.rows != NO_ROW)])[self.prompts.starts]
        share = np.diff(found) / np.maximum(np.diff(self.prompts.starts), 1)
        self.known = share.reshape(-1, GROUPS).astype(np.float32)

    def _kept(self) -> tuple[NDArray[np.uint16], int]:
        """Give a row to each bucket that enough prompts have."""
        prompts, having = self.prompts, np.zeros(BUCKETS, np.int64)
        for start, end in pairwise(prompts.starts[::GROUPS]):
            having[np.unique(prompts.ids[start:end])] += 1
        kept = having >= self.recipe.least_prompts
        row_of = np.full(BUCKETS, NO_ROW, np.uint16)
        row_of[kept] = np.arange(kept.sum())
        return row_of, int(kept.sum())

    def _scale(self) -> Scale:
        stats = self.prompts.stats
        weights = np.repeat(self.share / self.lengths, self.lengths)
        logs = self.logs.astype(np.float64)
        order = np.argsort(logs)
        wide = np.interp(LEVELS, np.cumsum(weights[order]), logs[order])
        mean = float((weights * logs).sum())
        sd = float(np.sqrt((weights * (logs - mean) ** 2).sum()))
        return Scale(stats.mean(0), stats.std(0) + 1e-3, wide.astype(np.float32), mean, sd)

    def batch(self, random: np.random.Generator, whole: bool = False) -> Batch:
        """Draw rows, their prompts with most ids dropped unless `whole`."""
        recipe = self.recipe
        of = random.choice(len(self.share), recipe.batch, p=self.share)
        row = self.first[of] + random.integers(self.lengths[of])
        text = (random.random(recipe.batch) >= recipe.text_dropped).astype(np.float32)
        dropped = 0.0 if whole else recipe.ids_dropped
        matrix, known = self._matrix(self.prompt[row], text, dropped, random)
        history, actual = self._histories(row, random)
        return Batch(
            matrix, known, self.prompts.stats[self.prompt[row]], text[:, None], history, actual
        )

    def _matrix(
        self, prompt: Integers, text: Floats, dropped: float, random: np.random.Generator
    ) -> tuple[csr_matrix, Floats]:
        """Return (prompts x GROUPS, rows) whose product with the table is the groups' means."""
        groups = (prompt[:, None] * GROUPS + np.arange(GROUPS)).ravel()
        start = self.prompts.starts[groups]
        lengths = (self.prompts.starts[groups + 1] - start) * np.repeat(text > 0, GROUPS)
        owner = np.repeat(np.arange(len(groups)), lengths)
        at = np.arange(len(owner)) + np.repeat(start - np.cumsum(lengths) + lengths, lengths)
        if dropped:
            keep = random.random(len(owner), np.float32) >= dropped
            owner, at = owner[keep], at[keep]
        rows = self.rows[at]
        keep = rows != NO_ROW
        owner, rows = owner[keep], rows[keep]
        counts = np.bincount(owner, minlength=len(groups))
        ends = np.concatenate([[0], np.cumsum(counts)])
        values = (1 / np.maximum(counts, 1)).astype(np.float32)[owner]
        matrix = csr_matrix((values, rows.astype(np.int32), ends), (len(groups), self.known_rows))
        return matrix, self.known[prompt] * text[:, None]

    def _histories(self, row: Integers, random: np.random.Generator) -> tuple[Floats, Floats]:
        """Draw a history for each row as a stream would have given it, and its log length."""
        recipe, most = self.recipe, len(row)
        drawn = random.random((most, WINDOW)) * self.peer_count[row, None]
        windows = self.logs[self.peers[self.peer[row, None] + drawn.astype(np.int64)]]
        kind = random.random(most)
        counts = np.where(kind < recipe.history_short, random.integers(1, WINDOW, most), WINDOW)
        counts[kind < recipe.history_dropped] = 0
        # After a shift the older part of a window, or all of it, is of another set or model.
        older = random.integers(WINDOW + 1, size=most)
        older[random.random(most) >= recipe.history_shifted] = 0
        stale = np.arange(WINDOW) < older[:, None]
        windows = np.where(stale, windows[random.permutation(most)], windows)
        # Another model would have written more or less, and differed more or less.
        longer, wider = random.normal(0, 1, (most, 1)), np.exp(random.normal(0, 0.3, (most, 1)))
        told = (random.random((most, 1)) < recipe.stretched) & (counts[:, None] > 0)
        middle = windows.mean(1, keepdims=True)
        actual = self.logs[row][:, None]
        windows, actual = (
            np.where(told, np.maximum(middle + longer + (logs - middle) * wider, 0.0), logs)
            for logs in (windows, actual)
        )
        return summarise(windows, counts), actual[:, 0].astype(np.float32)


class Batch(NamedTuple):
    """Rows drawn for a step: ids as a matrix, what the network sees, log lengths."""

    matrix: csr_matrix
    known: Floats
    stats: Floats
    text: Floats
    history: Floats
    actual: Floats

    def inputs(self, table: Any) -> Inputs:
        """Return what the network sees, with embeddings from this table."""
        pooled = (self.matrix @ np.asarray(table)).reshape(len(self.text), GROUPS * DIMS)
        return Inputs(pooled, self.known, self.stats, self.text, self.history)


Say = Callable[[str], None]


def train(
    sets: Sequence[Rows], seed: int, recipe: Recipe | None = None, say: Say = lambda told: None
) -> Trained:
    """Train on rows of several sets. `say` hears what happens."""
    recipe = recipe or Recipe()
    data = Data(sets, recipe)
    trained = _train_own(data, recipe.steps, seed, say)
    if not recipe.folds:
        return replace(trained, weights=trained.weights | initial_trust(seed))
    examples = []
    for fold in range(recipe.folds):
        say(f"fold {fold}")
        kept, known, unseen = _parted(sets, fold, recipe.folds)
        if not kept:  # all rows are of one task
            kept, known, unseen = _parted(unseen, fold, 0)
        part = Data(kept, recipe)
        found = _train_own(part, recipe.fold_steps, seed + fold + 1, say)
        for rows, share in ((known, 1 - recipe.unseen), (unseen, recipe.unseen)):
            if rows:
                examples.append((share, found, Data(rows, replace(recipe, power=0.0), like=part)))
    trust = _train_trust(examples, recipe, seed, say)
    return replace(trained, weights=trained.weights | trust)


def _parted(
    sets: Sequence[Rows], fold: int, folds: int
) -> tuple[list[Rows], list[Rows], list[Rows]]:
    """Return rows to train on, rows of other prompts, and rows of tasks that are not in them.

    `folds` 0: no task is left out.
    """
    parts: tuple[list[Rows], list[Rows], list[Rows]] = ([], [], [])
    for rows in sets:
        tasks = np.array(
            [_hash(_family(rows.name, task)) % folds if folds else -1 for task in rows.tasks]
        )
        prompts = np.array([_hash(prompt) % 8 for prompt in rows.prompts])
        unseen = tasks[rows.task] == fold
        other = prompts[rows.prompt] == fold % 8
        for part, mask in zip(parts, (~unseen & ~other, ~unseen & other, unseen), strict=True):
            if mask.any():
                part.append(rows.take(mask))
    return parts


def _family(name: str, task: str) -> bytes:
    """Return what a task is one of: the last part of its name, whatever its level is."""
    return FAMILIES.get(name, f"{name}/{task.split('/')[-1]}").encode()


def _hash(text: bytes) -> int:
    return int.from_bytes(blake2b(text, digest_size=4).digest())


def _train_own(data: Data, steps: int, seed: int, say: Say) -> Trained:
    """Train the embeddings and the network proper."""
    recipe = data.recipe
    random = np.random.default_rng((seed, 1))
    schedule = optax.cosine_decay_schedule(recipe.rate, steps)
    moves = optax.adamw(schedule, b2=0.99, weight_decay=recipe.weight_decay)
    table_moves = optax.adamw(schedule, b2=0.99, weight_decay=recipe.table_decay)

    @jax.jit
    def step(weights: Weights, state: Any, average: Any, batch: Any, key: Any) -> Any:
        def loss(weights: Weights, pooled: Any) -> Any:
            inputs, actual = batch
            said = own(weights, data.scale, inputs._replace(pooled=pooled), key)
            return pinball(said.quantiles, actual, LEVELS).mean()

        slope = jax.value_and_grad(loss, (0, 1))
        value, (slopes, pooled_slopes) = slope(weights, batch[0].pooled)
        changes, state = moves.update(slopes, state, weights)
        weights = optax.apply_updates(weights, changes)
        return weights, state, _averaged(average, weights, recipe.average), value, pooled_slopes

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def table_step(table: Any, state: Any, average: Any, slopes: Any) -> Any:
        changes, state = table_moves.update(slopes, state, table)
        table = optax.apply_updates(table, changes)
        return table, state, _averaged(average, table, recipe.average)

    weights = average = initial(seed)
    table = jnp.asarray(random.normal(0, 0.05, (data.known_rows, DIMS)), jnp.float32)
    table_average = table + 0
    state, table_state = moves.init(weights), table_moves.init(table)
    key = jax.random.PRNGKey(seed + 1)
    for number in range(steps):
        drawn = data.batch(random)
        key, dropping = jax.random.split(key)
        weights, state, average, value, slopes = step(
            weights, state, average, (drawn.inputs(table), drawn.actual), dropping
        )
        table_slopes = drawn.matrix.T @ np.asarray(slopes).reshape(-1, DIMS)
        table, table_state, table_average = table_step(
            table, table_state, table_average, table_slopes
        )
        if number % 200 == 199:
            say(f"step {number + 1}: loss {float(value):.4f}")
    return Trained(average, np.asarray(table_average), data.row_of, data.scale)


def _train_trust(
    examples: Sequence[tuple[float, Trained, Data]], recipe: Recipe, seed: int, say: Say
) -> Weights:
    """Train what weighs a network against the window, on what that network had not seen."""
    random, says = np.random.default_rng((seed, 2)), jax.jit(own)
    said, actual, shares = [], [], []
    for share, found, data in examples:
        for _ in range(recipe.trust_batches):
            drawn = data.batch(random, whole=True)
            said.append(says(found.weights, found.scale, drawn.inputs(found.table)))
            actual.append(drawn.actual)
            shares.append(np.full(len(drawn.actual), share))
    every = Own(*(np.concatenate(parts) for parts in zip(*said, strict=True)))
    lengths = np.concatenate(actual)
    chance = np.concatenate(shares) / np.concatenate(shares).sum()
    schedule = optax.cosine_decay_schedule(recipe.rate, recipe.trust_steps)
    moves = optax.adamw(schedule, weight_decay=recipe.weight_decay)

    @jax.jit
    def step(weights: Weights, state: Any, said: Any, actual: Any) -> Any:
        def loss(weights: Weights) -> Any:
            lost = pinball(trusted(weights, said), actual, LEVELS)
            regretted = jax.nn.relu(lost - pinball(said.window, actual, LEVELS))
            return (lost + recipe.regret * regretted).mean()

        value, slopes = jax.value_and_grad(loss)(weights)
        changes, state = moves.update(slopes, state, weights)
        return optax.apply_updates(weights, changes), state, value

    weights = initial_trust(seed)
    state = moves.init(weights)
    for _ in range(recipe.trust_steps):
        row = random.choice(len(lengths), 2 * recipe.batch, p=chance)
        weights, state, value = step(
            weights, state, Own(*(part[row] for part in every)), lengths[row]
        )
    say(f"trust: loss {float(value):.4f}")
    return weights


def _averaged(average: Any, new: Any, share: float) -> Any:
    return jax.tree.map(lambda old, now: share * old + (1 - share) * now, average, new)
