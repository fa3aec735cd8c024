"""A real `odma serve` under load from several engines, killed and started again.

An engine stops at the first call without an answer. So after a kill nothing moves, and the
books of each pool can be held against its engine's model: at the last acknowledged seq, or one
further, if the service had done the batch whose answer never came.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

from odma_service._native import Arena, Recovery
from odma_service.bench.engine import Engine
from odma_service.bench.model import Findings
from odma_service.client import Client
from odma_service.demo.server import start, stop
from odma_service.errors import OdmaError

ENGINES = {"one": True, "two": True, "three": False, "four": False}
"""Pools, and whether their engine has one ordered stream."""

SHORTEST_LIFE_SECONDS, LONGEST_LIFE_SECONDS = 0.02, 0.25


class Tally:
    """What became of the kills so far."""

    def __init__(self) -> None:
        self.kills = 0
        self.in_batch = 0
        self.acknowledged = 0


def torture(
    directory: Path, kills: int, seed: int, findings: Findings, watch: Callable[[], None]
) -> Tally:
    """Kill a server so many times, or as many as it takes to find something wrong."""
    random, tally = Random(seed), Tally()
    if kills == 0:
        return tally
    process, target = start(directory)
    try:
        with Client(target) as service:
            engines = [
                Engine(service, name, random.randrange(2**32), single_stream=single)
                for name, single in ENGINES.items()
            ]
        while tally.kills < kills and not findings.words:
            with ThreadPoolExecutor(len(engines)) as threads:
                work = [threads.submit(engine.work, target) for engine in engines]
                time.sleep(random.uniform(SHORTEST_LIFE_SECONDS, LONGEST_LIFE_SECONDS))
                process.kill()
                process.communicate()
                for done in work:
                    done.result()
            tally.kills += 1
            tally.in_batch += _was_in_batch(directory)
            process, target = start(directory, target)
            with Client(target) as service:
                for engine in engines:
                    _examine(engine, service, findings)
            watch()
    finally:
        stop(process)
    tally.acknowledged = sum(engine.acknowledged for engine in engines)
    return tally


def _examine(engine: Engine, service: Client, findings: Findings) -> None:
    try:
        engine.examine(service, findings)
    except OdmaError as error:
        findings.note("lost", f"pool {engine.name}: {error}")


def _was_in_batch(directory: Path) -> bool:
    """Say whether a commit was half done, from copies: the server is to recover by itself."""
    found = False
    copy = directory / "copy"
    for path in sorted((directory / "pools").glob("*.pool")):
        shutil.copyfile(path, copy)
        copy.chmod(0o600)
        try:
            with Arena.attach(copy) as arena:
                found |= arena.report().recovery != Recovery.CLEAN
        except OdmaError:
            pass  # the server will find it too, and then it is lost
    copy.unlink(missing_ok=True)
    return found
