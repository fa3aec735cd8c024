"""Builds the C library as the extension `odma_service._native._odma`.

The declarations come from the marked parts of the public headers, so none exists twice.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

CSRC = Path("csrc")  # setuptools takes no absolute paths: builds start in the project's root

HEADERS = ("odma.h", "odma_lpddr.h", "odma_features.h")


def declarations(header: str) -> str:
    """Return the marked part of a public header."""
    text = (CSRC / header).read_text()
    return text.partition("/* cffi: begin */")[2].partition("/* cffi: end */")[0]


ffibuilder = FFI()
ffibuilder.cdef("".join(map(declarations, HEADERS)) + "int odma_own_faults(void);")
ffibuilder.set_source(
    "odma_service._native._odma",
    "".join(f'#include "{header}"\n' for header in HEADERS) + "int odma_own_faults(void);",
    sources=[str(CSRC / "odma.c")],
    depends=[str(path) for path in sorted(CSRC.rglob("*.[ch]"))],
    include_dirs=[str(CSRC)],
    define_macros=[("ODMA_OWN_FAULTS", None)],
    libraries=["m"],
    extra_compile_args=["-std=c11", "-O2", "-flto=auto", "-fvisibility=hidden"],
    extra_link_args=["-flto=auto"],
)
