"""The C programs of the laboratory, compiled with the library as the extension is."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from odma_service.errors import OdmaError

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c11", "-O2", "-flto=auto", "-fPIC")


class BenchError(OdmaError):
    """A benchmark could not be run."""


def compile_program(source: Path, directory: Path) -> Path:
    """Compile a C program with the library. Raises BenchError without a compiler."""
    sources = [source, ROOT / "csrc" / "odma.c"]
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise BenchError("no C compiler: install cc or gcc")
    program = directory / source.stem
    command: list[str | Path] = [
        compiler,
        *FLAGS,
        f"-I{ROOT / 'csrc'}",
        *sources,
        "-lm",
        "-pthread",
    ]
    command += ["-o", program]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0:
        raise BenchError(f"{source} does not compile: {built.stderr[:1000]}")
    return program


def compile_fused_extension(directory: Path) -> Path:
    """Compile the extension so that it calls fuse.c before each store to a pool's file."""
    source, extension = directory / "_odma.c", directory / "_odma.so"
    emit = "import sys; from odma_service._native.build import ffibuilder as ffi"
    emit += "; ffi.emit_c_code(sys.argv[1])"
    program = [ROOT / "lab" / "robustness" / "fuse.c", ROOT / "csrc" / "odma.c"]
    include = (f"-I{ROOT / 'csrc'}", f"-I{sysconfig.get_path('include')}")
    compiler = ("cc", *FLAGS, "-shared", "-DODMA_STORE_HOOK=burn_fuse", "-DODMA_OWN_FAULTS")
    commands: tuple[list[str | Path], ...] = (
        [sys.executable, "-c", emit, source],
        [*compiler, *include, source, *program, "-o", extension, "-lm", "-pthread"],
    )
    for command in commands:
        built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        if built.returncode != 0:
            raise BenchError(f"the extension does not compile: {built.stderr[-1000:]}")
    return extension
