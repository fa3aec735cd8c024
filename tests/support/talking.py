"""Made conversations: requests that wait for the answers their prompts contain."""

from __future__ import annotations

import numpy as np

from odma_service.traces import Trace
from odma_service.traces.trace import Waits

BLOCK = 64


def conversations(users, turns, seed, *, common_blocks=0):
    """Return a trace of users who talk with an agent: a prompt is all that was said before it."""
    random = np.random.default_rng(seed)
    ids = iter(range(10**6))
    common = [next(ids) for _ in range(common_blocks)]
    said = [list(common) for _ in range(users)]
    tokens = [len(common) * BLOCK] * users
    last = [-1] * users
    rows = []
    for turn in range(turns):
        for user in random.permutation(users).tolist():
            if turn and random.random() < 0.15:  # another session begins
                said[user], tokens[user] = list(common), len(common) * BLOCK
            prompt = tokens[user] + int(random.integers(20, 300))
            answer = int(random.integers(1, 250))
            tokens[user] = prompt + answer
            said[user] += [next(ids) for _ in range(tokens[user] // BLOCK - len(said[user]))]
            gap = float(random.choice([0.0, 0.4, 6.0]))
            came = 0.0 if turn else float(random.random() * 3)
            rows.append((prompt, answer, said[user][: prompt // BLOCK], last[user], gap, came))
            last[user] = len(rows) - 1
    prompts, answers, prefixes, after, gaps, came = zip(*rows, strict=True)
    return Trace(
        np.array(came).cumsum(),
        np.array(prompts),
        np.array(answers),
        f"conversations seed={seed}",
        prefix_ids=tuple(map(tuple, prefixes)),
        block_tokens=BLOCK,
        waits=Waits(np.array(after), np.array(gaps)),
    )
