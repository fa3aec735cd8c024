"""Servers that run through another program: namespaces and limits of their own."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import contextmanager

import pytest
from servers import PATIENCE_SECONDS, Server

from odma_service.client.local import ODMA


def insist_on(*wrapper):
    """Skip the test unless programs may be started through `wrapper`."""
    if (
        shutil.which(wrapper[0]) is None
        or subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip(f"{' '.join(wrapper)} is not possible here")


@contextmanager
def boxed(wrapper, directory):
    """Run a server through another program; yield it."""
    server = Server(directory, ("--log-format", "json"), program=(*wrapper, *ODMA)).start()
    try:
        yield server
    finally:
        server.kill()


def run_in(wrapper, *arguments):
    """Return why a command of `odma` fails that is run through another program."""
    command = [*wrapper, *ODMA, *map(str, arguments)]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert ran.returncode == 2, ran.stderr
    return ran.stderr
