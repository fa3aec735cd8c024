"""The C programs of `bench/`, compiled with the library as the extension is."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from odma_service.errors import OdmaError

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c11", "-O2", "-flto=auto", "-fPIC")
MEMORY = Path("/dev/shm")


class BenchError(OdmaError):
    """A benchmark could not be run."""


def compile_program(name: str, directory: Path) -> Path:
    """Compile bench/NAME.c with the library. Raises BenchError without sources or compiler."""
    sources = [ROOT / "bench" / f"{name}.c", ROOT / "csrc" / "odma.c"]
    if not all(source.exists() for source in sources):
        raise BenchError(f"no C sources in {ROOT}: run this from a source tree, not a package")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise BenchError("no C compiler: install cc or gcc")
    program = directory / name
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
        raise BenchError(f"{sources[0]} does not compile: {built.stderr[:1000]}")
    return program


def compile_fused_extension(directory: Path) -> Path:
    """Compile the extension so that it calls bench/fuse.c before each store to a pool's file."""
    source, extension = directory / "_odma.c", directory / "_odma.so"
    emit = "import sys; from odma_service._native.build import ffibuilder as ffi"
    emit += "; ffi.emit_c_code(sys.argv[1])"
    program = [ROOT / "bench" / "fuse.c", ROOT / "csrc" / "odma.c"]
    include = (f"-I{ROOT / 'csrc'}", f"-I{sysconfig.get_path('include')}")
    compiler = ("cc", *FLAGS, "-shared", "-DODMA_STORE_HOOK=burn_fuse")
    commands: tuple[list[str | Path], ...] = (
        [sys.executable, "-c", emit, source],
        [*compiler, *include, source, *program, "-o", extension, "-lm", "-pthread"],
    )
    for command in commands:
        built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        if built.returncode != 0:
            raise BenchError(f"the extension does not compile: {built.stderr[-1000:]}")
    return extension


@contextmanager
def workshop() -> Iterator[Path]:
    """Make a directory for arenas, in memory where the system has such a place."""
    place = MEMORY if MEMORY.is_dir() else None
    with TemporaryDirectory(prefix="odma-bench-", dir=place) as directory:
        yield Path(directory)
