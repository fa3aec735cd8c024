"""The safety share of `elastic`: as small as the preemptions seen allow.

The share that is kept back is lost to admission, and each preemption throws away a whole
prefill. Preempting the youngest is cheap: where answers are heavy-tailed, one preemption for
every seventh request costs less than the room that would prevent it. So the share grows when
there are more, and shrinks only when there are hardly any.
"""

from __future__ import annotations

LEAST_SHARE = 0.01
MOST_SHARE = 0.1
TOLERATED_RATE = 0.15  # preemptions per completion
IDLE_RATE = 0.03  # so few that the share is too large
GROWTH = 1.2
SHRINKAGE = 0.93


def adapted_share(share: float, preempted: int, completed: int) -> float:
    """Return the safety share after so many preemptions and completions.

    A share outside of [LEAST_SHARE, MOST_SHARE] was somebody's decision and stays.

    >>> adapted_share(0.04, preempted=2, completed=64)
    0.04
    """
    if not LEAST_SHARE <= share <= MOST_SHARE:
        return share
    if preempted > TOLERATED_RATE * completed:
        return min(share * GROWTH, MOST_SHARE)
    if preempted < IDLE_RATE * completed:
        return max(share * SHRINKAGE, LEAST_SHARE)
    return share
