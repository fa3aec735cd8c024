"""Survival: how long answers are when of some it is only known that they are longer.

A request that runs, or was stopped, has at least the length that it has reached. So at each
length the share ends there that finished there, of all that reached it, and what is unfinished
counts among the longer ones (Kaplan and Meier, JASA 1958).

    outliving       the estimate: the share that outlives each length
    kaplan_meier    from it the weight of each length, the rest at the longest
    life_table      from it a distribution, of requests that entered at a length above zero
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from odma_service.values import QUANTILE_LEVELS

LEVELS = np.array(QUANTILE_LEVELS)

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class Distribution(NamedTuple):
    """A distribution of log(1 + output tokens): logs ascend, weights sum to 1.

    completions: how many it is from; unseen: the weight that outlives them, and is guessed.
    """

    logs: Floats
    weights: Floats
    completions: int
    unseen: float

    def at(self, levels: Floats) -> Floats:
        """Return quantiles, interpolated between neighbours as those of a History are.

        >>> Distribution(np.array([1.0, 2.0, 3.0]), np.full(3, 1 / 3), 3, 0.0).at(np.array([0.25]))
        array([1.5])
        """
        [row] = quantiles(self.logs[None], self.weights[None], levels)
        return np.asarray(row)


def outliving(ended: Floats | Flags, at_risk: Floats | NDArray[np.int64]) -> Floats:
    """Return the share that outlives each length, in order along the first axis.

    Of `at_risk`, which reached it, `ended` end there.
    """
    ending = np.divide(ended, at_risk, out=np.zeros(ended.shape), where=at_risk > 0)
    return np.asarray(np.cumprod(1 - np.clip(ending, 0, 1), axis=0))


def kaplan_meier(finished: Floats, censored: Floats) -> Floats:
    """Return weights of ascending lengths, each censored weight spread over the longer ones.

    At one length the censored are those that end last. What outlives all ends at the last.
    """
    both = finished + censored
    total = float(both.sum())
    surviving = outliving(finished, np.cumsum(both[::-1])[::-1])
    weights = total * -np.diff(surviving, prepend=1.0)
    weights[-1] += total * surviving[-1]
    return np.clip(weights, 0, None)


def life_table(
    entered: Floats, reached: Floats, ended: Flags, beyond: Sequence[float] = (0.0,)
) -> Distribution:
    """Return the distribution of where requests end, on any scale of logarithms of length.

    Each is seen from where it `entered` to where it has `reached`. What outlives the longest
    lies `beyond` it, in equal parts.
    """
    order = np.lexsort((~ended, reached))
    reached, ended = reached[order], ended[order]
    at_risk = np.searchsorted(np.sort(entered), reached) - np.arange(len(reached))
    last = np.arange(len(reached)) == len(reached) - 1
    surviving = outliving(ended, np.maximum(at_risk, np.where(last, 1, 2)))
    weights = -np.diff(surviving, prepend=1.0)
    unseen, count = float(surviving[-1]), int(ended.sum())
    if unseen == 0:
        return Distribution(reached[ended], weights[ended], count, 0.0)
    return Distribution(
        np.append(reached[ended], reached[-1] + np.array(beyond)),
        np.append(weights[ended], np.full(len(beyond), unseen / len(beyond))),
        count,
        unseen,
    )


def summaries(logs: Floats, weights: Floats) -> Floats:
    """Return mean, standard deviation and quantiles at QUANTILE_LEVELS of each row.

    The logs of a row ascend. Its weights sum to 1, or are all 0: then its last is every quantile.
    """
    mean = _products(logs, weights)[:, None]
    deviation = _products((logs - mean) ** 2, weights)[:, None] ** 0.5
    return np.hstack([mean, deviation, quantiles(logs, weights, LEVELS)])


def quantiles(logs: Floats, weights: Floats, levels: Floats) -> Floats:
    """Return the quantiles of each row, interpolated between neighbours: (rows, levels)."""
    below = np.cumsum(weights, axis=1) - weights
    places = levels * (1 - weights[:, -1:])
    return np.array(list(map(np.interp, places, below, logs)))


def _products(values: Floats, weights: Floats) -> Floats:
    return np.asarray((values[:, None, :] @ weights[:, :, None])[:, 0, 0])
