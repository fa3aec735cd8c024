"""Builds the C library as the extension `odma_service._native._odma`.

The declarations come from the marked part of csrc/odma.h, so none exists twice.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

CSRC = Path("csrc")  # setuptools takes no absolute paths: builds start in the project's root

header = (CSRC / "odma.h").read_text()
declarations = header.partition("/* cffi: begin */")[2].partition("/* cffi: end */")[0]

ffibuilder = FFI()
ffibuilder.cdef(declarations)
ffibuilder.set_source(
    "odma_service._native._odma",
    '#include "odma.h"',
    sources=[str(path) for path in sorted(CSRC.glob("*.c"))],
    depends=[str(path) for path in sorted(CSRC.glob("*.h"))],
    include_dirs=[str(CSRC)],
    libraries=["m"],
    extra_compile_args=["-std=c11", "-O2"],
)
