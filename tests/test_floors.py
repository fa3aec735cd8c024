"""Every module stands on one floor and uses only what lies below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "odma_service"

# The name of a module or package, without `odma_service.`; what is inside it is included.
FLOORS = {
    "words": {"__init__", "errors", "values"},
    "binding": {"_native"},
    "domain": {"geometry", "lpddr", "policy", "pool"},
    "learning": {"learning"},
    "traces": {"traces"},
    "replay": {"replay"},
    "rpc": {"rpc"},
    "client": {"client"},
    "service": {"config", "metrics", "service", "server"},
    "cli": {
        "__main__",
        "arena_cli",
        "bench",
        "cli",
        "connect",
        "demo",
        "health_cli",
        "lpddr_cli",
        "pool_file",
        "predictor_cli",
        "replay_cli",
        "reproduce_cli",
        "status",
        "stream_cli",
        "top",
        "trace_cli",
        "watch_cli",
    },
}

MAY_USE = {
    "words": set(),
    "binding": {"words"},
    "domain": {"words", "binding"},
    "learning": {"words", "binding", "domain"},
    "traces": {"words"},
    "replay": {"words", "binding", "domain", "learning", "traces"},
    "rpc": set(),
    "client": {"words", "rpc"},
    "service": {"words", "binding", "domain", "learning", "rpc"},
    "cli": set(FLOORS),
}

# Who may touch the world outside.
OUTSIDE = {
    "grpc": {"rpc", "client", "service", "cli"},
    "clock": {"client", "service", "cli"},
    "environment": {"service", "cli"},
    "cffi": {"binding"},
}

GRPC = {"grpc", "grpc_health", "grpc_reflection", "grpc_status"}
CLOCK = {"time", "datetime.datetime.now", "datetime.datetime.utcnow", "datetime.date.today"}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"}


def test_no_module_uses_a_floor_above_it():
    assert violations(sources_of(PACKAGE)) == []


def test_every_floor_says_what_it_may_use():
    assert set(MAY_USE) == set(FLOORS)


def test_generated_code_is_seen():
    assert "odma_service.rpc.v1.types_pb2" in sources_of(PACKAGE)


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("pool", "from odma_service.service import Service", "domain may not use service"),
        ("pool", "import odma_service.server as above", "domain may not use service"),
        ("pool", "from odma_service import config", "domain may not use service"),
        ("pool", "from .config import Settings", "domain may not use service"),
        ("pool", "from . import config", "domain may not use service"),
        ("_native", "def f():\n    from odma_service import pool", "binding may not use domain"),
        ("_native.records", "from ..policy import Policy", "binding may not use domain"),
        ("_native.__init__", "from ..policy import Policy", "binding may not use domain"),
        ("learning.limits", "from odma_service.metrics import m", "learning may not use service"),
        ("client", "from odma_service.pool import Pool", "client may not use domain"),
        ("replay.loop", "from odma_service.rpc import v1", "replay may not use rpc"),
        ("replay.loop", "from odma_service import client", "replay may not use client"),
        ("traces.files", "from odma_service.pool import Pool", "traces may not use domain"),
        ("service", "from odma_service.cli import app", "service may not use cli"),
        ("pool", "if TYPE_CHECKING:\n    import grpc", "domain may not use grpc"),
        ("learning", "from grpc_health.v1 import health", "learning may not use grpc"),
        ("pool", "import time", "domain may not use clock"),
        ("pool", "from time import monotonic", "domain may not use clock"),
        ("pool", "import datetime as d\nd.datetime.now()", "domain may not use clock"),
        ("pool", "from datetime import datetime\ndatetime.now()", "domain may not use clock"),
        ("pool", "import os\nos.environ['HOME']", "domain may not use environment"),
        ("pool", "from os import getenv", "domain may not use environment"),
        ("client", "import os as system\nsystem.getenv('A')", "client may not use environment"),
        ("pool", "from cffi import FFI", "domain may not use cffi"),
        ("utils", "", "stands on no floor"),
    ],
)
def test_a_violation_is_reported(module, source, complaint):
    [reported] = violations({f"odma_service.{module}": source})
    assert reported.startswith(f"odma_service.{module}")
    assert reported.endswith(complaint)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pool", "from odma_service._native import Arena\nfrom odma_service import errors"),
        ("service", "import grpc, time, os\nos.environ['ODMA_LISTEN']"),
        ("demo.engine", "from odma_service import client\nfrom odma_service.rpc import v1 as pb"),
        ("geometry", "import os\nos.fsencode('x')\nfrom datetime import timedelta"),
        ("errors", "from odma_service.values import Refusal"),
    ],
)
def test_what_lies_below_may_be_used(module, source):
    assert violations({f"odma_service.{module}": source}) == []


def sources_of(package: Path) -> dict[str, str]:
    """Return the source of every module below `package`, by its dotted name."""
    paths = {path: path.relative_to(package.parent) for path in sorted(package.rglob("*.py"))}
    return {".".join(name.with_suffix("").parts): path.read_text() for path, name in paths.items()}


def violations(sources: dict[str, str]) -> list[str]:
    return [complaint for name in sources for complaint in complaints(name, sources)]


def complaints(name: str, sources: dict[str, str]) -> Iterator[str]:
    """Yield what is wrong with one module, each thing once."""
    own = floor(name)
    if own is None:
        yield f"{name} stands on no floor"
        return
    seen = set()
    for line, used in references(name, sources[name]):
        wanted = outside(used) or floor(used)
        if wanted in OUTSIDE:
            allowed = own in OUTSIDE[wanted]
        else:
            allowed = wanted in {None, own} | MAY_USE[own]
        if not allowed and wanted not in seen:
            seen.add(wanted)
            yield f"{name}:{line} {own} may not use {wanted}"


def floor(name: str) -> str | None:
    """Return the floor of a module of ours, or of a name in it."""
    package, _, inside = name.partition(".")
    if package != "odma_service":
        return None
    first = inside.partition(".")[0]
    return next((floor for floor, members in FLOORS.items() if first in members), None)


def outside(used: str) -> str | None:
    """Return which part of the outside world a dotted name belongs to."""

    def among(names: set[str]) -> bool:
        return any(used == name or used.startswith(f"{name}.") for name in names)

    if among(GRPC):
        return "grpc"
    if among(CLOCK):
        return "clock"
    if among(ENVIRONMENT):
        return "environment"
    return "cffi" if among({"cffi"}) else None


def references(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Yield line and absolute dotted name of all that is imported or reached through it."""
    nodes = list(ast.walk(ast.parse(source)))
    bound: dict[str, str] = {}
    for node in nodes:
        for name, meaning, used in bindings(module, node):
            bound[name] = meaning
            yield node.lineno, used
    for node in nodes:
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            if first in bound:
                yield node.lineno, ".".join((bound[first], *rest))


def bindings(module: str, node: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Yield what an import binds: the local name, its meaning, and what it imports."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            top = alias.name.partition(".")[0]
            yield alias.asname or top, alias.name if alias.asname else top, alias.name
    elif isinstance(node, ast.ImportFrom):
        above = module.split(".")[: -node.level] if node.level else []
        origin = ".".join((*above, *filter(None, [node.module])))
        for alias in node.names:
            full = f"{origin}.{alias.name}"
            yield alias.asname or alias.name, full, full
