"""Programs as processes: `odma`, and the clients in other languages."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from fcntl import LOCK_EX, flock
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest
from paths import JAVASCRIPT, ROOT

from odma_service.client.local import ODMA, READY

CPP = ROOT / "build" / "cpp"
CPP_PACKAGES = ("grpc++", "protobuf", "nlohmann_json")
BUILD_SECONDS = 500


def odma(
    *arguments: object, environment: Mapping[str, str] | None = None, timeout: float = 110
) -> subprocess.CompletedProcess[str]:
    """Run a command of `odma` to its end; it may fail.

    `environment`: variables over those of the tests.
    """
    return subprocess.run(
        [*ODMA, *map(str, arguments)],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def fail_to_serve(*arguments: object) -> str:
    """Return why a server does not start with these flags."""
    ran = odma("serve", *arguments)
    assert ran.returncode == 2
    assert READY not in ran.stdout
    return ran.stderr


def run(*command: str | Path, timeout: float = 100) -> str:
    """Return what a program prints; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def miss_client(missing: str) -> NoReturn:
    """Skip a test for want of a client's packages, or fail if they must not be missing."""
    if os.environ.get("ODMA_REQUIRE_CLIENTS"):
        pytest.fail(missing)
    pytest.skip(missing)


def need_node() -> str:
    """Return the path of node, whose packages are there."""
    node = shutil.which("node")
    if node and (JAVASCRIPT / "node_modules" / "@grpc").is_dir():
        return node
    miss_client("no JavaScript client: `make examples/javascript/node_modules/.installed` gets it")


@cache
def need_cpp() -> Path:
    """Return the folder of the C++ programs, built if they are not, or not any more."""
    tools = ("g++", "make", "protoc", "grpc_cpp_plugin", "pkg-config")
    there = (
        all(map(shutil.which, tools))
        and not subprocess.run(["pkg-config", "--exists", *CPP_PACKAGES], check=False).returncode
    )
    if not there:
        miss_client("no C++ client: `make deps` gets what it needs from Debian")
    command = ["make", "-s", f"-j{os.cpu_count()}", "-C", ROOT / "examples" / "cpp"]
    CPP.mkdir(parents=True, exist_ok=True)
    with (CPP / "lock").open("w") as lock:  # tests may run in several processes
        flock(lock, LOCK_EX)
        run(*command, "CXXFLAGS=-O0 -Werror", timeout=BUILD_SECONDS)
    return CPP
