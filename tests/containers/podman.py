"""A container engine of one's own, without a daemon and without a registry of images.

podman runs containers with runc and answers docker-compose over a socket. The image's base is made
of Debian's packages, from where apt gets them. Storage, networks, sockets and settings lie in one
directory; nothing that another podman has is seen or changed. It wants Debian, and root.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

PROGRAMS = ("podman", "runc", "debootstrap", "docker-compose", "netavark", "iptables")
BASE = "python:3.11-slim"  # the name in the Dockerfile's FROM
BASE_PACKAGES = "python3,python3-venv,python3-dev,python-is-python3,ca-certificates"
TRUSTED = Path("/etc/ssl/certs/ca-certificates.crt")

SETTINGS = """
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = "{directory}/tmp"
[network]
network_backend = "netavark"
network_config_dir = "{directory}/networks"
"""
STORAGE = """
[storage]
driver = "overlay"
graphroot = "{directory}/storage"
runroot = "{directory}/run"
"""


def missing() -> list[str]:
    """Return what this machine lacks."""
    found = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin", "/usr/lib/podman"))
    absent = [program for program in PROGRAMS if not shutil.which(program, path=found)]
    return absent if os.geteuid() == 0 else [*absent, "root"]


def make_base(archive: Path) -> None:
    """Write the files of a small Debian with Python, from the archive that apt's sources name."""
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    wanted = ("Created-By: Packages", "Component: main", f"Codename: {release}")
    command = ["apt-get", "indextargets", "--format", "$(SITE)", *wanted]
    site = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    archive.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="odma-base-") as root:
        command = ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}"]
        subprocess.run([*command, release, root, site], check=True)
        shutil.rmtree(Path(root, "var/cache/apt"))
        partial = archive.with_suffix(".partial")
        subprocess.run(["tar", "-C", root, "-cf", partial, "."], check=True)
        partial.rename(archive)


class Podman:
    """podman with everything in `directory`, and its service for docker-compose."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        settings, storage = directory / "containers.conf", directory / "storage.conf"
        settings.write_text(SETTINGS.format(directory=directory))
        storage.write_text(STORAGE.format(directory=directory))
        self._environment = {
            **os.environ,
            "CONTAINERS_CONF": str(settings),
            "CONTAINERS_STORAGE_CONF": str(storage),
            "DISABLE_HC_SYSTEMD": "true",  # who waits for health asks for it
            "DOCKER_HOST": f"unix://{directory}/podman.sock",
        }
        self._log = (directory / "service.log").open("w")
        self._service = subprocess.Popen(
            ["podman", "system", "service", "--time=0", self._environment["DOCKER_HOST"]],
            env=self._environment,
            stdout=self._log,
            stderr=self._log,
        )

    def __call__(self, *arguments: object) -> str:
        """Run a command of podman, which must succeed; return what it prints."""
        return self.run("podman", *arguments)

    def run(self, *command: object, environment: Mapping[str, str] | None = None) -> str:
        """Run a program that finds this podman; it must succeed."""
        with self.popen(*command, environment=environment) as process:
            told, complaints = process.communicate()
        assert process.returncode == 0, f"{command}\n{told}\n{complaints}"
        return told

    def popen(
        self, *command: object, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            list(map(str, command)),
            env={**self._environment, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def build(self, name: str, context: Path, *flags: object) -> None:
        """Build an image with the network and the certificates of this machine."""
        trust = ["--volume", f"{TRUSTED}:{TRUSTED}:ro"] if TRUSTED.exists() else []
        build = [
            "build",
            "--format",
            "docker",
            "--network",
            "host",
            "--pull=never",
            *trust,
            "--tag",
            name,
        ]
        self(*build, *flags, context)

    def inspect(self, container: str) -> dict:
        [found] = json.loads(self("container", "inspect", container))
        return found

    def close(self) -> None:
        """Remove all containers and end what was started."""
        with ExitStack() as stack:
            stack.callback(self._log.close)
            stack.callback(self._unmount)
            stack.callback(self._service.wait)
            stack.callback(self._service.terminate)
            self("rm", "--all", "--force", "--time", 0)
            self("network", "prune", "--force")

    def _unmount(self) -> None:
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for mount in reversed(mounts):
            if Path(mount).is_relative_to(self._directory):
                subprocess.run(["umount", mount], check=True)
