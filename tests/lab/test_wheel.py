"""What a user gets from a wheel and from the sdist: all but the laboratory and the tests."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from shutil import copytree, ignore_patterns
from zipfile import ZipFile

import pytest
from paths import ROOT

from odma_service.cli import COMMANDS

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
MADE = (".*", "build", "dist", "node_modules", "__pycache__", "*.egg-info", "*.so", "*.o")


def run(*command, cwd=None):
    command = [str(part) for part in command]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=100, check=False, cwd=cwd
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Return a copy of the tree, so that nothing made before gets into what is built."""
    folder = tmp_path_factory.mktemp("built") / "tree"
    copytree(ROOT, folder, ignore=ignore_patterns(*MADE))
    return folder


@pytest.fixture(scope="module")
def wheel(tree):
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", tree.parent)
    built = run(*PIP, "wheel", *options, tree)
    assert built.returncode == 0, built.stderr
    [path] = tree.parent.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(tree):
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tree.parent)!r})"
    built = run(sys.executable, "-c", build, cwd=tree)
    assert built.returncode == 0, built.stderr
    [path] = tree.parent.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def home(request, tmp_path_factory):
    """Install it beside our libraries, but without this source tree; return the environment."""
    home = tmp_path_factory.mktemp("venv")
    assert run(sys.executable, "-m", "venv", "--without-pip", home).returncode == 0
    [packages] = home.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--no-warn-script-location")
    package = request.getfixturevalue(request.param)
    installed = run(*PIP, "--python", home / "bin/python", "install", *options, package)
    assert installed.returncode == 0, installed.stderr
    return home


@pytest.fixture
def odma(home):
    return lambda *arguments: run(home / "bin/odma", *arguments)


def test_one_wheel_is_for_every_python_from_3_11_on(wheel):
    assert "-cp311-abi3-" in wheel.name


def test_neither_the_laboratory_nor_tests_are_in_the_wheel(wheel):
    packages = {Path(name).parts[0] for name in ZipFile(wheel).namelist()}
    info = {name for name in packages if name.endswith((".dist-info", ".data"))}
    assert packages - info == {"odma_service", "predictor_onnx"}


def test_nothing_made_before_is_in_the_sdist(sdist):
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert [name for name in names if name.endswith((".so", ".o", ".pyc"))] == []
    assert not {Path(name).parts[1] for name in names if "/" in name} & {"tests", "lab", "build"}


def test_the_contract_and_what_to_deploy_are_installed(home):
    share = home / "share" / "odma"
    for folder in ("proto", "deploy"):
        ours = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.*") if path.is_file()}
        left_out = {
            path for path in ours if path.name == "buf.yaml" or "provisioning" in path.parts
        }
        there = {path.relative_to(share) for path in (share / folder).rglob("*.*")}
        assert {path for path in there if (share / path).is_file()} == ours - left_out


def test_the_help_lists_every_command(odma):
    ran = odma("--help")
    assert ran.returncode == 0, ran.stderr
    for name in COMMANDS:
        assert f"\n  {name} " in ran.stdout


@pytest.mark.parametrize("command", ["bench arena", "bench rpc", "bench torture", "reproduce"])
def test_a_command_of_the_laboratory_says_what_it_needs(odma, command):
    ran = odma(*command.split(), "--json")
    assert (ran.returncode, ran.stdout) == (2, "")
    [line] = ran.stderr.splitlines()
    assert line.startswith(f"odma {command}: it needs a source tree of ODMA")


def test_a_command_of_the_product_works(odma):
    ran = odma("lpddr", "estimate", "--tokens", "256", "--planes", "2", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["layouts"][0]["name"] == "contiguous"


def test_tuning_writes_nothing_into_the_package_and_refuses_without_data(home, odma, tmp_path):
    [own] = home.glob("lib/python*/site-packages/odma_service/replay/tuned.json")
    before = own.read_bytes()
    assert odma("tune").returncode == 2
    ran = odma("tune", "--data", tmp_path, "--out", own)
    assert (ran.returncode, own.read_bytes()) == (2, before)
    assert "not within the package" in ran.stderr
    out = tmp_path / "tuned.json"
    ran = odma("tune", "--data", tmp_path, "--out", out)
    assert (ran.returncode, out.exists()) == (2, False)
    assert "mooncake" in ran.stderr
