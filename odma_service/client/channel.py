"""How a client reaches the service, and what every call says besides its message."""

from __future__ import annotations

import re
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import grpc

from odma_service.errors import OdmaError

CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    # A connection whose other end vanished is given up after 15 seconds.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)

Headers = tuple[tuple[str, str], ...]


class Tls(NamedTuple):
    """PEM files of a connection with TLS. No ca: the authorities that gRPC knows.

    `cert` and `key` show who the client is, to a service that asks for it.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Return the files' contents. Raises OdmaError for a file that cannot be read."""
        try:
            ca, cert, key = (path.read_bytes() if path else None for path in self)
        except OSError as error:
            raise OdmaError(f"cannot read {error.filename}: {error.strerror}") from None
        return grpc.ssl_channel_credentials(ca, key, cert)


LOCAL = re.compile(r"unix(-abstract)?:.*|(dns:(//[^/]*)?/?)?localhost(:[0-9]+)?", re.IGNORECASE)
ADDRESS = re.compile(r"(?:ipv[46]:|dns:///)?\[?([0-9a-fA-F.:]+?)\]?(?::[0-9]+)?")


def is_local(target: str) -> bool:
    """Whether a target is a socket of this machine: Unix or on the loopback, by its very name.

    >>> is_local("127.0.0.1:50051"), is_local("[::1]:50051"), is_local("10.0.0.1:50051")
    (True, True, False)
    """
    if LOCAL.fullmatch(target):
        return True
    address = ADDRESS.fullmatch(target)
    try:
        return bool(address and ip_address(address[1]).is_loopback)
    except ValueError:
        return False


class Caller:
    """Who calls. Without a token nobody in particular.

    Raises OdmaError for a token that would go over a network in plain.
    """

    def __init__(self, token: str | None, target: str, tls: Tls | None) -> None:
        if token and tls is None and not is_local(target):
            raise OdmaError(f"the token would go to {target} in plain: connect with TLS")
        self._token: Headers = (("authorization", f"Bearer {token}"),) if token else ()

    @property
    def metadata(self) -> Headers | None:
        """The metadata of a call made now."""
        return (*self._token, *_trace()) or None


def _trace() -> Headers:
    """Return the headers of the current span, for those who trace with OpenTelemetry."""
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry import propagate

    headers: dict[str, str] = {}
    propagate.inject(headers)
    return tuple(headers.items())
