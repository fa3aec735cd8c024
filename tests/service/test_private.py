"""Nothing leaves the machine, and nothing is written outside the directories that were named."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from servers import PLAIN, Server, open_pool

from odma_service.client import Client
from odma_service.client.local import ODMA
from odma_service.rpc.v1 import predictor_service_pb2 as predictor_pb

WRITES = re.compile(r"O_WRONLY|O_RDWR|O_CREAT")
CALLS = "connect,sendto,sendmsg,sendmmsg,open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2"
LOOPBACK = ("127.", "::1", "::ffff:127.")
OURS = ("/dev/", "/proc/self/", "/proc/thread-self/")


@pytest.fixture
def strace() -> str:
    found = shutil.which("strace")
    if found is None:
        pytest.skip("NOT TESTED that nothing leaves the machine: no strace; `make deps` gets it")
    return found


def traced(strace: str, file: Path) -> tuple[str, ...]:
    return (strace, "-D", "-f", "-qq", "-y", "-s", "256", "-e", f"trace={CALLS}", "-o", str(file))


def strange(trace: Path, named: Path) -> list[str]:
    """Return the lines of a trace that reach another machine or write outside a directory."""
    return [
        line
        for line in trace.read_text(errors="replace").splitlines()
        if _goes_out(line) or _writes_outside(line, named)
    ]


def _goes_out(line: str) -> bool:
    addresses = re.findall(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"', line)
    return any(not (four or six).startswith(LOOPBACK) for four, six in addresses)


def _writes_outside(line: str, named: Path) -> bool:
    call = re.search(r"(open|openat|creat|mkdir|mkdirat|rename\w*)\(", line)
    if not call or (call[1].startswith("open") and not WRITES.search(line)):
        return False
    if re.search(r"= -1 (ENOENT|EEXIST|EACCES|EROFS|ENOTDIR|EISDIR)", line):
        return False
    paths = re.findall(r'"([^"]*)"', line)
    return any(not path.startswith((str(named), *OURS)) for path in paths[-1:])


def quiet(tmp_path: Path) -> dict[str, str]:
    """Return an environment with an empty home, and with room for what is passing."""
    for name in ("home", "passing"):
        (tmp_path / name).mkdir()
    return {
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "passing"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def test_a_service_that_predicts_tells_nobody_and_writes_where_it_was_told(strace, tmp_path):
    trace, environment = tmp_path / "trace", quiet(tmp_path)
    program = (*traced(strace, trace), *ODMA)
    server = Server(
        tmp_path / "server", ("--reflection",), environment=environment, program=program
    )
    server.start()
    try:
        with Client(server.target, timeout_seconds=60) as client:
            open_pool(client, "p").apply()
            prompt = predictor_pb.Prompt(prompt_tokens=10, text="Why is the sky blue?")
            assert client.predict("p", [prompt]).model_version
    finally:
        server.terminate()
    assert "model.onnx" in trace.read_text(errors="replace")
    assert strange(trace, tmp_path) == []
    assert list((tmp_path / "home").rglob("*")) == []


def test_a_command_that_predicts_tells_nobody_and_writes_nothing_at_home(strace, tmp_path):
    trace, environment = tmp_path / "trace", quiet(tmp_path)
    command = [*traced(strace, trace), *ODMA, "demo", "--rows", "20", "--json"]
    subprocess.run(command, env=PLAIN | environment, capture_output=True, timeout=110, check=False)
    assert "model.onnx" in trace.read_text(errors="replace")
    assert strange(trace, tmp_path) == []
    assert list((tmp_path / "home").rglob("*")) == []
