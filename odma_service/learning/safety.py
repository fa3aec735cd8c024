"""The safety share of `elastic`: as small as the preemptions seen allow.

What is kept back from admission is lost to it, and each preemption throws away a whole
prefill. So the share grows fast when requests are preempted and shrinks slowly when none
are.
"""

from __future__ import annotations

LEAST_SHARE = 0.01
MOST_SHARE = 0.15
TOLERATED_RATE = 0.01  # preemptions per completion
GROWTH = 1.5
SHRINKAGE = 0.95


def adapted_share(share: float, preempted: int, completed: int) -> float:
    """Return the safety share after so many preemptions and completions.

    A share outside of [LEAST_SHARE, MOST_SHARE] was somebody's decision and stays.

    >>> adapted_share(0.04, preempted=2, completed=64)
    0.06
    """
    if not LEAST_SHARE <= share <= MOST_SHARE:
        return share
    if preempted > TOLERATED_RATE * completed:
        return min(share * GROWTH, MOST_SHARE)
    if preempted == 0:
        return max(share * SHRINKAGE, LEAST_SHARE)
    return share
