"""What a user gets from a wheel: every command in the help, and none of the laboratory's files."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from shutil import copytree, ignore_patterns
from zipfile import ZipFile

import pytest
from paths import ROOT

from odma_service.cli import COMMANDS

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
MADE = (".*", "build", "dist", "node_modules", "__pycache__", "*.egg-info", "*.so", "*.o")


def run(*command):
    command = [str(part) for part in command]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy, so that nothing made before gets into it."""
    folder = tmp_path_factory.mktemp("wheel")
    copytree(ROOT, folder / "tree", ignore=ignore_patterns(*MADE))
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder)
    built = run(*PIP, "wheel", *options, folder / "tree")
    assert built.returncode == 0, built.stderr
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def odma(wheel, tmp_path_factory):
    """Install the wheel beside our libraries, but without this source tree."""
    home = tmp_path_factory.mktemp("venv")
    assert run(sys.executable, "-m", "venv", "--without-pip", home).returncode == 0
    [packages] = home.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--no-deps", "--no-index", "--no-warn-script-location")
    installed = run(*PIP, "--python", home / "bin/python", "install", *options, wheel)
    assert installed.returncode == 0, installed.stderr
    return lambda *arguments: run(home / "bin/odma", *arguments)


def test_neither_the_laboratory_nor_tests_are_in_the_wheel(wheel):
    packages = {Path(name).parts[0] for name in ZipFile(wheel).namelist()}
    info = {name for name in packages if name.endswith(".dist-info")}
    assert packages - info == {"odma_service", "predictor_onnx"}


def test_the_help_lists_every_command(odma):
    ran = odma("--help")
    assert ran.returncode == 0, ran.stderr
    for name in COMMANDS:
        assert f"│ {name} " in ran.stdout


@pytest.mark.parametrize("command", ["bench arena", "bench rpc", "reproduce"])
def test_a_command_of_the_laboratory_says_what_it_needs(odma, command):
    ran = odma(*command.split(), "--json")
    assert (ran.returncode, ran.stdout) == (2, "")
    [line] = ran.stderr.splitlines()
    assert line.startswith(f"odma {command}: it needs a source tree of ODMA")


def test_a_command_of_the_product_works(odma):
    ran = odma("lpddr", "estimate", "--tokens", "256", "--planes", "2", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["layouts"][0]["name"] == "contiguous"
