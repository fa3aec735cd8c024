"""The compiled extension; everything else is in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["odma_service/_native/build.py:ffibuilder"])
