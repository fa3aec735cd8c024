"""Options that several commands have: where the service is and how to reach it; JSON.

The token comes from ODMA_TOKEN alone: other users can read a command line.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from odma_service.errors import IdentityError, InvalidError, UnavailableError
from odma_service.values import TenantShare

if TYPE_CHECKING:
    from odma_service.client import Client

TOKEN = "ODMA_TOKEN"

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
TraceFormat = Annotated[
    str | None,
    typer.Option(
        "--format", help="Of the trace (docs/reference/traces.md). Default: what its marks say."
    ),
]
Tenants = Annotated[
    list[str] | None,
    typer.Option(
        metavar="<str>",
        help="A tenant's shares of the pool, NAME=GUARANTEED[:MAXIMUM]; may be repeated.",
    ),
]
Ca = Annotated[
    Path | None,
    typer.Option(envvar="ODMA_CLIENT_CA", help="PEM file: who signs the service's certificate."),
]
Cert = Annotated[
    Path | None, typer.Option(envvar="ODMA_CLIENT_CERT", help="PEM file: our own certificate.")
]
Key = Annotated[Path | None, typer.Option(envvar="ODMA_CLIENT_KEY", help="PEM file: its key.")]


class MovesChoice(StrEnum):
    """Moves, as a word on the command line."""

    ANY = "any"
    OWN_GROWTH = "own-growth"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the service is, and how to reach it: with TLS if asked or if there is a PEM file."""

    target: Annotated[str, typer.Option(help="The service: host:port or unix:/path.")] = (
        "127.0.0.1:50051"
    )
    ca: Ca = None
    cert: Cert = None
    key: Key = None
    tls: Annotated[
        bool,
        typer.Option("--tls", envvar="ODMA_CLIENT_TLS", help="Use TLS; --ca: whom to trust."),
    ] = False

    @property
    def how(self) -> str:
        """Whether the connection has TLS, in words."""
        return "with TLS" if self._secure else "without TLS"

    @property
    def _secure(self) -> bool:
        return bool(self.tls or self.ca or self.cert or self.key)

    def client(self, retry_seconds: float = 0) -> Client:
        """Return a client with the token of the environment. Raises OdmaError for a bad file."""
        from odma_service.client import Client, Tls

        tls = Tls(self.ca, self.cert, self.key) if self._secure else None
        token = os.environ.get(TOKEN, "").strip()
        return Client(self.target, retry_seconds=retry_seconds, tls=tls, token=token or None)


def tenant_of(text: str) -> TenantShare:
    """Return the shares that an option gives. Raises InvalidError.

    >>> tenant_of("chat=0.4")
    TenantShare(name='chat', guaranteed_share=0.4, maximum_share=1.0)
    """
    name, _, shares = text.rpartition("=")
    guaranteed, _, maximum = shares.partition(":")
    try:
        return TenantShare(name, float(guaranteed), float(maximum or 1))
    except ValueError:
        raise InvalidError("tenant", f"NAME=GUARANTEED[:MAXIMUM], not {text!r}") from None


def taking(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of a class as options, in place of its first parameter."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = signature(command, eval_str=True).parameters.values()
        shared = signature(kind, eval_str=True).parameters

        @wraps(command)
        def run(**given: Any) -> None:
            command(kind(*(given.pop(name) for name in shared)), **given)

        run.__signature__ = Signature([*own, *shared.values()])  # type: ignore[attr-defined]
        return run

    return wrap


def connecting(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a Connection as its first parameter; say what a failure may come from."""

    @wraps(command)
    def run(connection: Connection, **given: Any) -> None:
        try:
            command(connection, **given)
        except UnavailableError as error:
            told = f"is `odma serve` running at {connection.target}, {connection.how}?"
            raise UnavailableError(f"{error}; {told}") from None
        except IdentityError as error:
            raise IdentityError(f"{error}; {TOKEN} is the variable of the token") from None

    return taking(Connection)(run)
