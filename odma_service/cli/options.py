"""How the commands connect: where, and what a service with TLS and tokens asks for.

The token comes from ODMA_TOKEN alone: other users can read a command line.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from odma_service.client import Client, Tls

DEFAULT_TARGET = "127.0.0.1:50051"
TOKEN = "ODMA_TOKEN"

Target = Annotated[str, typer.Option(help="The service: host:port or unix:/path.")]
Ca = Annotated[
    Path | None,
    typer.Option(envvar="ODMA_CLIENT_CA", help="PEM file: who signs the service's certificate."),
]
Cert = Annotated[
    Path | None, typer.Option(envvar="ODMA_CLIENT_CERT", help="PEM file: our own certificate.")
]
Key = Annotated[Path | None, typer.Option(envvar="ODMA_CLIENT_KEY", help="PEM file: its key.")]


def connect(
    target: str,
    ca: Path | None = None,
    cert: Path | None = None,
    key: Path | None = None,
    retry_seconds: float = 0,
) -> Client:
    """Return a client with the token of the environment; with TLS if there is a PEM file.

    Raises OdmaError for a file that cannot be read.
    """
    tls = Tls(ca, cert, key) if ca or cert or key else None
    token = os.environ.get(TOKEN, "").strip()
    return Client(target, retry_seconds=retry_seconds, tls=tls, token=token or None)
