"""The server of a soak: a process that is killed, stopped and left without room."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from resource import RLIMIT_FSIZE, prlimit

from lab.robustness.counting import PATIENCE_SECONDS, CallCounts, CountingClient
from lab.robustness.engine import CAPACITY_TOKENS, PLANES
from lab.robustness.servers import resident_bytes
from lab.robustness.twin import Findings
from odma_service.client.local import ODMA, start, stop
from odma_service.errors import PoolLimitError, UnavailableError
from odma_service.values import Moves

STOPPED_SECONDS = 1.5  # longer than the timeout
SAMPLE_SECONDS = 0.25
FULL_BYTES = 4096


def stop_for_a_while(process: subprocess.Popen[str]) -> None:
    """Stop a process for longer than its callers wait, and let it go on."""
    process.send_signal(signal.SIGSTOP)
    time.sleep(STOPPED_SECONDS)
    process.send_signal(signal.SIGCONT)


class Host:
    """The server process, what is done to it, and how much memory each life of it takes.

    A life's first half warms up: threads come with the first busy moments, and stay.
    """

    def __init__(self, directory: Path, seed: int, tally: CallCounts, findings: Findings) -> None:
        self._directory = directory
        self._random = Random(seed)
        self._tally = tally
        self._findings = findings
        self.target = "127.0.0.1:0"
        self._process, self.target = self._started()
        self._samples: list[int] = []
        self.most_bytes = 0
        self.growth_bytes: list[int] = []  # of each life, in its second half

    def serve(self, seconds: float) -> None:
        """Let it serve for so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(SAMPLE_SECONDS)
            self._samples.append(resident_bytes(self._process.pid))
            self.most_bytes = max(self.most_bytes, self._samples[-1])

    @property
    def befalls(self) -> Sequence[Callable[[], None]]:
        """What can be done to it. It serves again after each."""
        return self._kill, self._end, self._stop, self._fill, self._rival

    def _kill(self) -> None:
        self._renew("kill", signal.SIGKILL)

    def _end(self) -> None:
        self._renew("end", signal.SIGTERM)

    def _renew(self, how: str, number: signal.Signals) -> None:
        self._tally.failed(f"server {how}")
        self._process.send_signal(number)
        self._process.communicate()
        self._end_life()
        self._process, _ = self._started()

    def _stop(self) -> None:
        self._tally.failed("server stop")
        stop_for_a_while(self._process)

    def _fill(self) -> None:
        """Let no file of it grow for a while: no pool is made, and its logs take no line."""
        self._tally.failed("server full disk")
        name = f"full-{self._random.randrange(2**32)}"
        limits = prlimit(self._process.pid, RLIMIT_FSIZE)
        prlimit(self._process.pid, RLIMIT_FSIZE, (FULL_BYTES, limits[1]))
        try:
            with suppress(PoolLimitError, UnavailableError):
                self._open_and_close(name, retry_seconds=0)
                self._findings.note("leaked", f"pool {name} was made without room")
            time.sleep(STOPPED_SECONDS)
        finally:
            prlimit(self._process.pid, RLIMIT_FSIZE, limits)
        self._open_and_close(name, retry_seconds=PATIENCE_SECONDS)

    def _open_and_close(self, name: str, retry_seconds: float) -> None:
        with CountingClient(self.target, self._tally, retry_seconds) as service:
            service.open_pool(
                name, planes=PLANES, capacity_tokens=CAPACITY_TOKENS, moves=Moves.NONE
            ).close_pool()

    def _rival(self) -> None:
        """Start another server on the directory; it is refused."""
        self._tally.failed("server rival")
        command = [*ODMA, "serve", "--pool-dir", str(self._directory / "pools")]
        command += ["--listen", "127.0.0.1:0", "--metrics-listen", ""]
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
        )
        if "belongs to another server" not in ran.stderr:
            self._findings.note("doubled", f"a second server: {ran.stdout}{ran.stderr[-500:]}")

    def _started(self) -> tuple[subprocess.Popen[str], str]:
        log = ("--decision-log", str(self._directory / "decisions.jsonl"))
        return start(self._directory, self.target, log)

    def close(self) -> None:
        """End it for good."""
        self._end_life()
        stop(self._process)

    def _end_life(self) -> None:
        if len(self._samples) > 1:
            self.growth_bytes.append(self._samples[-1] - self._samples[len(self._samples) // 2])
        self._samples = []
