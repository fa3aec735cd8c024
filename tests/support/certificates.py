"""Certificates for the tests, made anew each time."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from odma_service.client import Tls

DAY = timedelta(days=1)
LOCAL = (x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates; `cert` is what others need to trust it."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self._name = _name(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        made = (
            self._builder(self._name, self._key, DAY)
            .add_extension(constraints, critical=True)
            .sign(self._key, SHA256())
        )
        self.cert = directory / f"{name}.pem"
        self.cert.write_bytes(made.public_bytes(Encoding.PEM))

    def sign(
        self,
        name: str,
        *names: x509.GeneralName,
        lasts: timedelta = DAY,
        since: timedelta = -2 * DAY,
    ) -> Pair:
        """Return a certificate for `name` and other names, over by now if `lasts` is negative."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(_name(name), key, lasts, since)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        pair = Pair(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        pair.cert.write_bytes(builder.sign(self._key, SHA256()).public_bytes(Encoding.PEM))
        write_key(pair.key, key)
        return pair

    def _builder(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        lasts: timedelta,
        since: timedelta = -2 * DAY,
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + since)
            .not_valid_after(now + lasts)
        )

    def trusted(self, own: Pair | None = None) -> Tls:
        """Return what a client needs that trusts this authority and may show who it is."""
        return Tls(self.cert, own and own.cert, own and own.key)


def write_key(path: Path, key: ec.EllipticCurvePrivateKey, password: bytes | None = None) -> None:
    """Write a key for its owner alone."""
    path.touch(mode=0o600)
    how = BestAvailableEncryption(password) if password else NoEncryption()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how))


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
