"""A deployment in small: a real server, and an engine whose answers are as long as a set says.

It leaves the server's decision log, with sketches of the prompts unless --no-sketches: what
`odma predictor train` learns from. A request ends when so many later ones were asked for.

    python tools/deployment.py SET.parquet --out decisions.jsonl
"""

from __future__ import annotations

import argparse
import tempfile
from collections import deque
from pathlib import Path

import numpy as np

from odma_service.client import Client
from odma_service.client.local import start, stop
from odma_service.values import Allocate, End, Free, Moves, PlaneGroup, PolicyChange
from predictor_onnx.rows import read_rows

CAPACITY_TOKENS = 1 << 25
LONGEST_TOKENS = 1 << 17
STEP = 16
"""Requests of a batch."""


def main() -> None:
    """Serve the rows of the sets in a shuffle of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8_000, help="most rows of all")
    parser.add_argument("--split", help="rows of this split only")
    parser.add_argument("--delay", type=int, default=64, help="requests until an answer ends")
    parser.add_argument("--most-output", type=int, help="answers are cut at so many tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-sketches", action="store_true")
    asked = parser.parse_args()
    sets = [read_rows(file, split=asked.split) for file in asked.files]
    every = [(rows, i) for rows in sets for i in range(len(rows))]
    order = np.random.default_rng(asked.seed).permutation(len(every))[: asked.rows]
    flags = ["--decision-log", str(asked.out.absolute()), "--decision-log-bytes", str(1 << 40)]
    flags += [] if asked.no_sketches else ["--decision-log-sketches"]
    with tempfile.TemporaryDirectory() as directory:
        process, target = start(Path(directory), flags=flags)
        try:
            with Client(target) as service:
                _serve(service, [every[i] for i in order], asked)
        finally:
            stop(process)


def _serve(service: Client, requests: list, asked: argparse.Namespace) -> None:
    pool = service.open_pool(
        "main",
        planes=[PlaneGroup(2, 64)],
        capacity_tokens=CAPACITY_TOKENS,
        moves=Moves.NONE,
        model_length_tokens=LONGEST_TOKENS,
        policy=PolicyChange(name="odma"),
    )
    running: deque = deque()
    for first in range(0, len(requests), STEP):
        batch, ops = requests[first : first + STEP], []
        while len(running) > max(asked.delay - STEP, 0):
            ops.append(Free(*running.popleft()))
        freed = len(ops)
        for number, (rows, i) in enumerate(batch, first):
            prompt = int(rows.prompt_tokens[i])
            most = asked.most_output
            ops.append(
                Allocate(
                    f"r{number}",
                    prompt,
                    request_class=rows.models[rows.model[i]][:32],
                    text=rows.prompts[rows.prompt[i]].decode(errors="replace")[:4_000],
                    max_total_tokens=None if most is None else prompt + most,
                )
            )
        results = pool.apply(ops=ops, completed_seq=pool.seq).results
        for (rows, i), place in zip(batch, results[freed:], strict=True):
            output = int(rows.output_tokens[i])
            limited = asked.most_output is not None and output > asked.most_output
            end = End.HIT_LIMIT if limited else End.FINISHED
            tokens = asked.most_output if limited else output
            running.append((place.handle, end, tokens))
    pool.apply(ops=[Free(*request) for request in running])


if __name__ == "__main__":
    main()
