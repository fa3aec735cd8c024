"""A real `odma serve` under load from several engines, killed and started again.

Every other kill comes from outside at a random moment; the others hit a store into a file of a
pool, by a fuse (bench/fuse.c) that burns with every store, so that they hit commits half done.

An engine stops at the first call without an answer. So after a kill nothing moves, and the
books of each pool can be held against its engine's twin: as last acknowledged, or with the call
whose answer never came done wholly.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from lab.bench.building import compile_fused_extension
from lab.robustness.twin import Findings
from lab.robustness.victim import Victim
from odma_service._native import Arena, Recovery
from odma_service.client import Client
from odma_service.client.local import start, stop
from odma_service.errors import OdmaError

ENGINES = {
    "one": (True, 0),
    "two": (True, 64),
    "three": (False, 0),
    "four": (False, 64),
}
"""Pools, whether their engine has one ordered stream, and their granules."""

SHORTEST_LIFE_SECONDS, LONGEST_LIFE_SECONDS = 0.02, 0.25
MOST_STORES = 3_000  # of all pools, until the fuse is burnt
PATIENCE_SECONDS, ENDING_SECONDS = 60, 5
FUSED_SERVER = """
import importlib.util, os, sys
os.environ["TORTURE_FUSE"], extension = sys.argv.pop(1), sys.argv.pop(1)
name = "odma_service._native._odma"
spec = importlib.util.spec_from_file_location(name, extension)
sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[name])
from odma_service.__main__ import main
main()
"""


@dataclass
class Kills:
    """Kills of one kind. in_batch: they left a commit half done."""

    kills: int = 0
    in_batch: int = 0


class ServiceKills:
    """What became of the kills so far."""

    def __init__(self) -> None:
        self.at_moments = Kills()
        self.at_stores = Kills()
        self.acknowledged = 0
        self.reused_tokens = 0
        self.calls: dict[str, int] = {}

    @property
    def kills(self) -> int:
        """All of them."""
        return self.at_moments.kills + self.at_stores.kills

    @property
    def in_batch(self) -> int:
        """All that left a commit half done."""
        return self.at_moments.in_batch + self.at_stores.in_batch

    def figures(self) -> dict[str, object]:
        """Return all but what the engines were told, as it is printed."""
        return {
            "kills": self.kills,
            "in_batch": self.in_batch,
            "at_moments": asdict(self.at_moments),
            "at_stores": asdict(self.at_stores),
            "reused_tokens": self.reused_tokens,
            "acknowledged": dict(sorted(self.calls.items())),
        }


class Fuse:
    """How many stores a server has left; 0: any number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(8))

    def light(self, stores: int) -> None:
        """Let a server live for so many stores."""
        with self.path.open("r+b", buffering=0) as file:
            file.write(stores.to_bytes(8, "little"))


def torture(
    directory: Path, kills: int, seed: int, findings: Findings, watch: Callable[[], None]
) -> ServiceKills:
    """Kill a server so many times, or as many as it takes to find something wrong."""
    random, tally, fuse = Random(seed), ServiceKills(), Fuse(directory / "fuse")
    if kills == 0:
        return tally
    extension = compile_fused_extension(directory)
    program = (sys.executable, "-c", FUSED_SERVER, str(fuse.path), str(extension))
    process, target = start(directory, program=program)
    try:
        with Client(target) as service:
            engines = [
                Victim(
                    service,
                    name,
                    random.randrange(2**32),
                    single_stream=single,
                    granule_tokens=granule_tokens,
                )
                for name, (single, granule_tokens) in ENGINES.items()
            ]
        while tally.kills < kills and not findings.words:
            kind = tally.at_moments
            with ThreadPoolExecutor(len(engines)) as threads:
                work = [threads.submit(engine.work, target) for engine in engines]
                if tally.kills % 2:
                    fuse.light(random.randrange(1, MOST_STORES))
                    wait(work, PATIENCE_SECONDS)  # they end with their server
                    if _ends(process):
                        kind = tally.at_stores
                else:
                    time.sleep(random.uniform(SHORTEST_LIFE_SECONDS, LONGEST_LIFE_SECONDS))
                process.kill()
                process.communicate()
                fuse.light(0)
                for done in work:
                    done.result()
            kind.kills += 1
            kind.in_batch += _was_in_batch(directory)
            process, target = start(directory, target, program=program)
            with Client(target) as service:
                for engine in engines:
                    _examine(engine, service, findings)
            watch()
    finally:
        stop(process)
    for engine in engines:
        tally.acknowledged += engine.acknowledged
        tally.reused_tokens += engine.reused_tokens
        for call, count in engine.calls.items():
            tally.calls[call] = tally.calls.get(call, 0) + count
    return tally


def _ends(process: subprocess.Popen[str]) -> bool:
    """Say whether a server that no longer answers has ended by itself: its fuse is burnt."""
    try:
        return process.wait(ENDING_SECONDS) == -signal.SIGKILL
    except subprocess.TimeoutExpired:
        return False


def _examine(engine: Victim, service: Client, findings: Findings) -> None:
    try:
        engine.examine(service, findings)
    except OdmaError as error:
        findings.note("lost", f"pool {engine.name}: {type(error).__name__}: {error}")


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
