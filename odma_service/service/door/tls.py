"""Connections: TLS, client certificates, and the rule for listening beyond the loopback.

A connection of a Unix socket stays plain: the file's permissions guard it.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple, NoReturn

import grpc
import structlog

from odma_service.errors import InvalidError, OdmaError
from odma_service.service.config import UNIX, Settings
from odma_service.service.door.access import Access
from odma_service.service.door.private import Reloaded, read_file

PEM = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
VERSION, UTC_TIME, LONGEST_SHORT = 0xA0, 0x17, 0x7F  # tags, and the longest length of one byte

log = structlog.get_logger()


class TlsFiles(NamedTuple):
    """PEM files. Without client_ca, clients need no certificate."""

    cert: Path
    key: Path
    client_ca: Path | None


class Certificates(NamedTuple):
    """What is served, and when the first certificate of its chain ends."""

    configuration: grpc.ServerCertificateConfiguration
    not_after_unix_seconds: float


def certificates_of(settings: Settings, identities: Access | None) -> Reloaded[Certificates] | None:
    """Return the certificates of the TCP listeners, None where they are plain.

    Raises OdmaError for a file that cannot be used, and for a listener that others can reach
    but that is not both encrypted and closed to strangers, unless the settings allow it.
    """
    files = _files_of(settings)
    if identities and identities.takes_certificates and not settings.tls_client_ca:
        raise InvalidError("tls-client-ca", "needed, as the token file names certificates")
    for address, lack, remedy in _unguarded(settings, files, identities):
        if not settings.allow_insecure:
            raise OdmaError(f"{address} is reachable from other machines, and {lack}; {remedy}")
        log.warning("listening beyond the loopback", address=address, but=lack)
    if files is None:
        return None
    return Reloaded([path for path in files if path], lambda: _certificates(files))


def credentials_of(
    certificates: Reloaded[Certificates] | None, settings: Settings
) -> grpc.ServerCredentials | None:
    """Return credentials that read changed files anew at every handshake; None: plain."""
    if certificates is None:
        return None
    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
        certificates.get().configuration,
        lambda: certificates.get().configuration,
        require_client_authentication=settings.tls_client_ca is not None,
    )
    return credentials


def _unguarded(
    settings: Settings, files: TlsFiles | None, identities: Access | None
) -> Iterator[tuple[str, str, str]]:
    """Yield address, lack and remedy of each listener that strangers can reach."""
    guarded = files is not None and bool(identities or files.client_ca)
    for address in () if guarded else settings.listen:
        if not is_local(address):
            yield (
                address,
                "callers need no token or certificate" if files else "its connections are plain",
                "set tls-cert and tls-key, and token-file or tls-client-ca, or else allow-insecure",
            )
    if settings.metrics_listen and not is_local(settings.metrics_listen):
        remedy = "scrape them on this machine, or set allow-insecure"
        yield settings.metrics_listen, "whoever can connect reads the metrics", remedy


def _files_of(settings: Settings) -> TlsFiles | None:
    cert, key = settings.tls_cert, settings.tls_key
    if cert and key:
        return TlsFiles(cert, key, settings.tls_client_ca)
    if cert or key:
        raise InvalidError("tls-key" if cert else "tls-cert", "tls-cert and tls-key go together")
    if settings.tls_client_ca:
        raise InvalidError("tls-client-ca", "needs tls-cert and tls-key too")
    return None


def _certificates(files: TlsFiles) -> Certificates:
    """Return the contents of the files, checked by OpenSSL. Raises OdmaError."""
    key = read_file(files.key, private=True)
    cert = read_file(files.cert, private=False)
    client_ca = read_file(files.client_ca, private=False) if files.client_ca else None
    _insist_certificates(files.cert)
    if files.client_ca:
        _insist_certificates(files.client_ca)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.cert, files.key, _no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise OdmaError(f"{files.key} is not the key of {files.cert}") from None
        raise OdmaError(f"{files.key} holds no private key in PEM form") from None
    configuration = grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)
    return Certificates(configuration, min(map(_not_after, PEM.findall(cert.decode()))))


def _not_after(certificate: str) -> float:
    """Return when a certificate ends, in Unix seconds.

    RFC 5280: SEQUENCE {SEQUENCE {[0] version, serial, algorithm, issuer, validity {from, to} ...
    """
    _, whole, _ = _element(ssl.PEM_cert_to_DER_cert(certificate))
    _, rest, _ = _element(whole)
    tag, _, after = _element(rest)
    for _ in range(3 if tag == VERSION else 2):
        _, _, after = _element(after)
    _, validity, _ = _element(after)
    _, _, rest = _element(validity)
    tag, text, _ = _element(rest)
    form = "%y%m%d%H%M%SZ" if tag == UTC_TIME else "%Y%m%d%H%M%SZ"
    return datetime.strptime(text.decode(), form).replace(tzinfo=UTC).timestamp()


def _element(data: bytes) -> tuple[int, bytes, bytes]:
    """Return the tag and the content of the first element of DER, and what follows it."""
    tag, length, start = data[0], data[1], 2
    if length > LONGEST_SHORT:
        start += length - LONGEST_SHORT - 1
        length = int.from_bytes(data[2:start])
    return tag, data[start : start + length], data[start + length :]


def _insist_certificates(path: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError:
        raise OdmaError(f"{path} holds no certificate in PEM form") from None


def _no_password() -> NoReturn:
    raise OdmaError("the TLS key is encrypted; a service cannot be asked for its password")


def is_local(address: str) -> bool:
    """Return whether only this machine can reach a listener. Raises OdmaError for a bad address."""
    if address.startswith(UNIX):
        return True
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise OdmaError(f"cannot listen on {address}: {error.strerror}") from None
    return all(ip_address(place[0]).is_loopback for *_, place in found)
