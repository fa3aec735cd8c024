"""The image and the compose file, for real: built, brought up, scraped, killed, and looked into.

`make test-containers` runs this, and `make test` does not. All of it lies in a temporary directory,
but for the base of the image, which is made once: build/containers. Grafana is not run.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import pytest
from paths import ROOT
from podman import BASE, Podman, make_base, missing
from servers import books, open_pool, wait_for

from odma_service.client import Client, chained_keys
from odma_service.errors import InvalidError, PoolNotFoundError, RefusedError
from odma_service.rpc.v1 import pool_service_pb2 as pb
from odma_service.values import Allocate, End, Free, PolicyChange

pytestmark = pytest.mark.timeout(900)

PATIENCE_SECONDS = 150
BASE_ARCHIVE = ROOT / "build" / "containers" / "base.tar"
PROMETHEUS = ROOT / "build" / "prometheus" / "usr" / "bin" / "prometheus"
IMAGE = "odma-service"
USER = 1000

# In the place of the image that docker-compose.yml names, which only a registry has.
PROMETHEUS_IMAGE = f"""
FROM {BASE}
COPY prometheus /bin/prometheus
RUN install --directory --owner nobody --group nogroup /prometheus
USER nobody
VOLUME /prometheus
ENTRYPOINT ["/bin/prometheus"]
"""
# podman raises the limits that a service with limits of its own does not name; not everybody may.
OVERRIDE = """
services:
  odma: {ulimits: {nofile: 4096, nproc: 4096}}
  prometheus: {image: odma-test-prometheus}
"""
RATE_INTERVAL = "1m"  # what Grafana takes: four times the scrape_interval


def run_none(why: str) -> NoReturn:
    """Skip all, or fail where containers must be run."""
    told = f"NO CONTAINER WAS RUN: {why}"
    if os.environ.get("ODMA_REQUIRE_CONTAINERS"):
        pytest.fail(told)
    print(told, file=sys.stderr)
    pytest.skip(told)


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    """Return a container engine; skip loudly without one, or fail if it must not be missing."""
    absent = [*missing(), *(() if PROMETHEUS.exists() else ("prometheus",))]
    if absent:
        run_none(f"no {', '.join(absent)}; as root, make deps-containers")
    if not BASE_ARCHIVE.exists():
        try:
            make_base(BASE_ARCHIVE)
        except subprocess.CalledProcessError as failed:
            run_none(f"the base image cannot be made: {failed}")
    with TemporaryDirectory(prefix="odma-containers-") as directory:
        engine = Podman(Path(directory))
        try:
            engine("import", BASE_ARCHIVE, BASE)
            engine.build(IMAGE, ROOT)
            yield engine
        finally:
            engine.close()


@dataclass(frozen=True)
class Stack:
    """The services of docker-compose.yml, on ports and with books of their own."""

    podman: Podman
    command: tuple[object, ...]
    environment: dict[str, str]
    pool_dir: Path
    since: float

    def compose(self, *arguments: object) -> str:
        return self.podman.run(*self.command, *arguments, environment=self.environment)

    def container(self, service: str) -> str:
        """Return the id of the one container of a service."""
        [found] = self.compose("ps", "--quiet", service).split()
        return found

    def engine(self, *arguments: object) -> subprocess.Popen[str]:
        """Start the engine of the profile `demo`, with these arguments over its own."""
        command = ("run", "--rm", "-T", "engine", "demo", "--target", "odma:50051", "--json")
        return self.podman.popen(*self.command, *command, *arguments, environment=self.environment)

    def healthy(self) -> bool:
        """Let the container's own health check run, as Docker does by the clock."""
        container = self.container("odma")
        with self.podman.popen("podman", "healthcheck", "run", container) as check:
            check.communicate()
        status = self.podman.inspect(container)["State"]["Health"]["Status"]
        return check.returncode == 0 and status == "healthy"

    def inside(self, command: str) -> str:
        """Return what a shell in the service's container prints."""
        return self.podman("exec", self.container("odma"), "sh", "-c", command)

    def kill(self) -> None:
        """Kill the service with SIGKILL; wait until its container was started again."""
        container = self.container("odma")
        killed = self.podman.inspect(container)["State"]["Pid"]
        os.kill(killed, signal.SIGKILL)
        wait_for(
            lambda: self.podman.inspect(container)["State"]["Pid"] not in (0, killed),
            "a restart by the restart policy",
        )
        wait_for(self.healthy, "health after a restart", PATIENCE_SECONDS)

    def client(self) -> Client:
        return Client(f"127.0.0.1:{self.environment['ODMA_PORT']}", retry_seconds=60)

    def ask(self, path: str, **parameters: object) -> dict:
        """Return what Prometheus answers."""
        address = f"http://127.0.0.1:{self.environment['PROMETHEUS_PORT']}/api/v1/{path}"
        with urllib.request.urlopen(f"{address}?{urllib.parse.urlencode(parameters)}") as page:
            return json.load(page)["data"]

    def drawn(self, query: str) -> bool:
        """Return whether a panel with this query shows a value from the start until now."""
        query = query.replace("$__rate_interval", RATE_INTERVAL).replace("$pool", ".*")
        found = self.ask("query_range", query=query, start=self.since, end=time.time(), step="15s")
        values = [float(value) for series in found["result"] for _, value in series["values"]]
        return any(map(math.isfinite, values))


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def stack(podman, tmp_path_factory) -> Iterator[Stack]:
    """Return the service and Prometheus, up and healthy."""
    directory = tmp_path_factory.mktemp("compose")
    (directory / "Dockerfile").write_text(PROMETHEUS_IMAGE)
    shutil.copy(PROMETHEUS, directory)
    podman.build("odma-test-prometheus", directory)
    override = directory / "override.yml"
    override.write_text(OVERRIDE)
    pool_dir = directory / "pools"
    pool_dir.mkdir(mode=0o700)
    os.chown(pool_dir, USER, USER)
    files = ("--file", ROOT / "docker-compose.yml", "--file", override)
    name = f"odma-test-{os.getpid()}"
    environment = {
        "ODMA_POOL_DIR": str(pool_dir),
        "ODMA_PORT": free_port(),
        "PROMETHEUS_PORT": free_port(),
    }
    command = ("docker-compose", "--project-name", name, *files)
    running = Stack(podman, command, environment, pool_dir, time.time())
    try:
        running.compose("up", "--detach", "--no-build", "odma", "prometheus")
        wait_for(running.healthy, "health", PATIENCE_SECONDS)
        yield running
    finally:
        running.compose("down", "--volumes")


def outcomes(engine: subprocess.Popen[str]) -> list[dict]:
    """Return what an engine found, which must have ended well."""
    told, complaints = engine.communicate()
    assert engine.returncode == 0, told + complaints
    return json.loads(told)["policies"]


def test_the_image_holds_no_compiler_and_no_build_tree(podman):
    def inside(command: str) -> str:
        return podman("run", "--rm", "--entrypoint", "sh", IMAGE, "-c", command)

    assert inside("command -v gcc cc c++ make ld || true") == ""
    assert inside("ls -d /src /root/.cache 2>/dev/null || true") == ""
    assert inside("find /opt/odma -name '*.[cho]' -path '*odma_service*'") == ""
    sizes = [json.loads(podman("image", "inspect", name))[0]["Size"] for name in (IMAGE, BASE)]
    print(f"image: {sizes[0] / 1e6:.0f} MB, {(sizes[0] - sizes[1]) / 1e6:.0f} MB over its base")
    assert sizes[0] - sizes[1] < 600e6


def test_the_service_has_no_more_than_it_needs(stack):
    status = dict(line.split(":\t", 1) for line in stack.inside("cat /proc/1/status").splitlines())
    assert status["Uid"].split() == [str(USER)] * 4
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert "read-only" in stack.inside("touch /new 2>&1 || true").lower()
    [core] = [
        line for line in stack.inside("cat /proc/1/limits").splitlines() if "core file" in line
    ]
    assert core.split()[4:6] == ["0", "0"]
    # cgroups of version 1 or 2
    limit = "cat /sys/fs/cgroup/{0}/{0}.{1} 2>/dev/null || cat /sys/fs/cgroup/{0}.max"
    assert stack.inside(limit.format("memory", "limit_in_bytes")).split() == [str(2 << 30)]
    assert stack.inside(limit.format("pids", "max")).split() == ["1024"]


def test_the_books_lie_outside_of_the_container_for_the_service_alone(stack):
    with stack.client() as service:
        open_pool(service, "outside")
    [file] = stack.pool_dir.glob("outside*")
    assert file.stat().st_uid == USER
    assert file.stat().st_mode & 0o077 == 0


def test_an_engine_in_the_network_plays_without_a_violation(stack):
    found = outcomes(stack.engine("--rows", 300))
    assert [one["policy"] for one in found] == ["static", "odma", "elastic"]
    for one in found:
        assert (one["finished"], one["violations"], one["balanced"]) == (300, 0, True)


def test_engines_and_books_survive_a_service_that_is_killed(stack):
    with stack.client() as service:
        open_pool(service, "kept").allocate(Allocate("request", 100))
        before = books(service, "kept")

        def playing() -> str | None:
            opened = [p for p in service.list_pools().pools if p.state == pb.POOL_STATE_OPEN]
            demos = [p.pool.name for p in opened if p.pool.name.startswith("demo-")]
            return next((n for n in demos if 50 < batches_of(n) < math.inf), None)

        def batches_of(name: str) -> float:
            try:
                return service.get_pool(name).counters.batches
            except PoolNotFoundError:  # the engine is done with it, and has forgotten it
                return math.inf

        engines = [stack.engine("--policy", "odma,elastic")]

        def at_work() -> str | None:
            """Name the pool of an engine; start another one if all are done."""
            if engines[-1].poll() is not None:
                engines.append(stack.engine("--policy", "odma,elastic"))
            return playing()

        for _ in range(3):
            name = wait_for(at_work, "an engine at work", PATIENCE_SECONDS)
            answered = batches_of(name)
            stack.kill()
            assert batches_of(name) >= answered
        found = [one for engine in engines for one in outcomes(engine)]
        assert books(service, "kept") == before
    for one in found:
        assert (one["finished"], one["violations"], one["balanced"]) == (1000, 0, True)


def panels() -> list[tuple[str, str]]:
    """Return the title and the query of everything the dashboard draws."""
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "odma.json").read_text())
    return [(p["title"], t["expr"]) for p in dashboard["panels"] for t in p["targets"]]


def test_every_query_of_the_dashboard_has_data(stack):
    with stack.client() as service:
        pool = open_pool(service, "trouble")
        pool.allocate(Allocate("holds", 1000))
        policy = PolicyChange(step_tokens=16, safety_share=0)
        keeps = open_pool(service, "keeps", granule_tokens=64, capacity_tokens=512, policy=policy)

        def reuse() -> None:
            """Make what the panels of reuse show: a run is kept, taken up again and given up."""
            keys = chained_keys(range(192), 64, b"")
            for request in (Allocate("a", 200, keys=keys), Allocate("b", 200, keys=keys)):
                [place] = keeps.apply(ops=[request]).results
                keeps.free(Free(place.handle, End.FINISHED, 1, keep_tokens=200))
            [place] = keeps.apply(ops=[Allocate("all", 500)]).results
            keeps.free(Free(place.handle, End.FINISHED, 1))

        def trouble() -> None:
            """Make what the panels of refusals and errors show."""
            with pytest.raises(InvalidError):
                open_pool(service, ".no-name")
            with pytest.raises(RefusedError):
                pool.allocate(Allocate("refused", 4096))

        empty = dict.fromkeys(panels())

        def all_drawn() -> bool:
            trouble()
            reuse()
            for panel in [panel for panel in empty if stack.drawn(panel[1])]:
                del empty[panel]
            return not empty

        assert len(empty) > 15
        try:
            wait_for(all_drawn, "data", PATIENCE_SECONDS)
        except AssertionError:
            pytest.fail(f"without data: {list(empty)}")


def test_prometheus_weighs_the_alerts_and_says_that_the_service_is_gone(stack):
    def rules() -> dict[str, dict]:
        [group] = stack.ask("rules")["groups"]
        return {rule["name"]: rule for rule in group["rules"]}

    assert len(rules()) > 5
    assert {rule["health"] for rule in rules().values()} == {"ok"}
    assert rules()["OdmaDown"]["state"] == "inactive"
    stack.compose("stop", "odma")

    def noticed() -> bool:
        return rules()["OdmaDown"]["state"] in ("pending", "firing")

    wait_for(noticed, "the alert OdmaDown", PATIENCE_SECONDS)
