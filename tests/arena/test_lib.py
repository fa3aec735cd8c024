"""`make lib`: the C library as others link it, shared and static, found by pkg-config."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
from paths import ROOT
from running import run

from odma_service import __version__
from odma_service._native import _odma

HEADERS = "".join(path.read_text() for path in (ROOT / "csrc").glob("odma*.h"))
PUBLIC = set(re.findall(r"\b(odma_\w+)\(", HEADERS))
ENGINE = ROOT / "examples" / "c" / "engine.c"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a prefix that the library was put under, by a build of its own."""
    place = tmp_path_factory.mktemp("lib")
    for name in ("Makefile", "csrc", "odma_service"):
        (place / name).symlink_to(ROOT / name)
    prefix = place / "prefix"
    run("make", "-C", place, "lib", f"PREFIX={prefix}")
    return prefix


def flags(prefix, *options):
    """Return what pkg-config says of the library."""
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    command = ["pkg-config", *options, "odma"]
    found = os.environ | {"PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig")}
    return subprocess.run(
        command, capture_output=True, text=True, env=found, check=True
    ).stdout.split()


def names(library, *options):
    """Return the names that a library defines for others."""
    listed = run("nm", *options, "--defined-only", "--extern-only", library)
    return {line.split()[-1] for line in listed.splitlines() if len(line.split()) == 3}


def test_the_example_engine_runs_with_the_shared_library(installed, tmp_path):
    engine = tmp_path / "engine"
    run("cc", "-std=c11", ENGINE, *flags(installed, "--cflags", "--libs"), "-o", engine)
    where = os.environ | {"LD_LIBRARY_PATH": str(installed / "lib")}
    told = subprocess.run(
        [engine, tmp_path / "books"], capture_output=True, text=True, env=where, check=True
    ).stdout
    assert "violations 0" in told
    assert "[libodma.so.0]" in run("readelf", "-d", engine)


def test_the_example_engine_runs_with_the_static_library(installed, tmp_path):
    engine = tmp_path / "engine"
    static = [
        installed / "lib" / "libodma.a" if flag == "-lodma" else flag
        for flag in flags(installed, "--cflags", "--libs", "--static")
    ]
    run("cc", "-std=c11", ENGINE, *static, "-o", engine)
    assert "violations 0" in run(engine, tmp_path / "books")
    assert "libodma" not in run("readelf", "-d", engine)


def test_the_shared_library_shows_the_header_and_nothing_else(installed):
    assert names(installed / "lib" / "libodma.so", "--dynamic") == PUBLIC


def test_the_static_library_shows_the_header_and_nothing_else(installed):
    assert names(installed / "lib" / "libodma.a") == PUBLIC


def test_an_engine_that_compiles_the_library_into_itself_gets_no_other_name(tmp_path):
    empty = tmp_path / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    for program, *sources in (("engine", ENGINE, ROOT / "csrc" / "odma.c"), ("empty", empty)):
        run("cc", "-std=c11", f"-I{ROOT / 'csrc'}", *sources, "-lm", "-o", tmp_path / program)
    added = names(tmp_path / "engine") - names(tmp_path / "empty")
    assert {name for name in added if "@" not in name} == PUBLIC  # stderr@GLIBC is not ours


def test_the_extension_of_python_shows_nothing_but_its_beginning():
    shown = names(_odma.__file__, "--dynamic")
    assert {name for name in shown if not name.startswith("_cffi")} == {"PyInit__odma"}


def test_pkg_config_knows_the_version(installed):
    assert flags(installed, "--modversion") == [__version__]


def test_the_header_compiles_as_cpp(installed, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "program.cpp"
    program.write_text("#include <odma.h>\nint main() { return odma_status_name(ODMA_OK)[0]; }\n")
    run("g++", "-Wall", "-Werror", *flags(installed, "--cflags"), "-c", program, "-o", "/dev/null")


def test_the_shortest_program_of_the_header_runs(installed, tmp_path):
    header = (ROOT / "csrc" / "odma.h").read_text()
    told = header.partition("The shortest program:\n")[2].partition("*/")[0]
    body = "\n".join(line.removeprefix(" *") for line in told.splitlines())
    (tmp_path / "shortest.c").write_text(
        f"#include <stdio.h>\n#include <odma.h>\nint main(void) {{\n{body}\n}}\n"
    )
    library = installed / "lib" / "libodma.a"
    program = tmp_path / "shortest"
    flags_of = flags(installed, "--cflags")
    run("cc", "-std=c11", "-Wall", "-Werror", *flags_of, tmp_path / "shortest.c", library, "-lm",
        "-o", program)  # fmt: skip
    done = subprocess.run([program], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "128 blocks from block 0\n"
