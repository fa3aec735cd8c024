"""The compiled extension and the tag of its wheel; everything else is in pyproject.toml.

cffi's extension keeps to the stable ABI, so one wheel does for CPython 3.11 and later.
"""

from setuptools import setup

setup(
    cffi_modules=["odma_service/_native/build.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
