"""Access: identities, the rpcs that their roles may call, and the pools that they see.

An identity is a name with a role. A caller proves its identity by a bearer token or by a name in
its client certificate; the token file lists them. Without a token file everybody may call
everything.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from odma_service.errors import IdentityError, OdmaError, PoolForeignError, RoleError
from odma_service.pool import NAME, NAME_RULE, PoolSpec
from odma_service.service.door.private import Reloaded, read_file


class Role(StrEnum):
    """The rights of an identity. READ_ONLY: to see the pools of the identity of the same name."""

    ENGINE = "engine"
    OPERATOR = "operator"
    READ_ONLY = "read-only"


_OWN = frozenset({Role.ENGINE})
_STEER = frozenset({Role.ENGINE, Role.OPERATOR})
_READ = frozenset(Role)

ROLES: Mapping[str, frozenset[Role]] = {
    "/odma.v1.MemoryService/OpenPool": _OWN,
    "/odma.v1.MemoryService/ClosePool": _STEER,
    "/odma.v1.MemoryService/KeepAlive": _OWN,
    "/odma.v1.MemoryService/Apply": _OWN,
    "/odma.v1.MemoryService/Stream": _OWN,
    "/odma.v1.MemoryService/Allocate": _OWN,
    "/odma.v1.MemoryService/Extend": _OWN,
    "/odma.v1.MemoryService/Free": _OWN,
    "/odma.v1.MemoryService/Reconcile": _OWN,
    "/odma.v1.MemoryService/Recalibrate": _STEER,
    "/odma.v1.MemoryService/SetPolicy": _STEER,
    "/odma.v1.PoolService/ListPools": _READ,
    "/odma.v1.PoolService/GetPool": _READ,
    "/odma.v1.PoolService/ListRegions": _READ,
    "/odma.v1.PoolService/Watch": _READ,
    "/odma.v1.PoolService/ForgetPool": _STEER,
    "/odma.v1.PredictorService/Predict": _READ,
    "/odma.v1.EmulatorService/EstimateAccess": _READ,
}
"""The roles that may call each rpc of ours; nobody may call an rpc that is missing here."""

OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.")
"""Services open to everybody: they tell nothing about pools."""

BEARER = "Bearer "
TOKEN = re.compile(r"[!-~]{16,512}", re.ASCII)
DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
PROOFS = ("token-sha256", "token", "certificate")
MOST_IDENTITIES = 4096

Proof = TypeVar("Proof", bytes, str)


class Identity(NamedTuple):
    """A caller, by name, role and its proof: the digest of a token or a name in a certificate."""

    name: str
    role: Role
    proof: bytes | str = ""

    @property
    def who(self) -> tuple[str, Role]:
        """Whose bounds the caller shares: all with this name and role, by whatever proof."""
        return self.name, self.role


CALLER: ContextVar[Identity | None] = ContextVar("caller", default=None)
"""The caller that this code runs for. None: callers need no identity."""

STILL_KNOWN: ContextVar[Callable[[], bool]] = ContextVar("still known", default=lambda: True)
"""Says whether the caller's proof is still in the token file."""


class _Table(NamedTuple):
    by_digest: dict[bytes, Identity]
    by_certificate: dict[str, Identity]


class Access:
    """The identities of a token file, as it is now."""

    def __init__(self, file: Path) -> None:
        """Read the file. Raises OdmaError that names its fault."""
        self._table = Reloaded([file], lambda: _read(file))

    @property
    def file(self) -> Reloaded[_Table]:
        """What reads the token file."""
        return self._table

    @property
    def takes_certificates(self) -> bool:
        """Whether a certificate proves any identity of the file."""
        return bool(self._table.get().by_certificate)

    def by_token(self, authorization: str) -> Identity:
        """Return the identity of the token in an `authorization` header. Raises IdentityError.

        Digests are looked up, not tokens. So the time of a look-up tells nothing about a token.
        """
        token = authorization[len(BEARER) :]
        if authorization[: len(BEARER)].lower() != BEARER.lower():
            raise IdentityError("the authorization header is not 'Bearer TOKEN'")
        digest = sha256(token.encode(errors="replace")).digest()
        identity = self._table.get().by_digest.get(digest)
        if identity is None:
            raise IdentityError("this token is not known here")
        return identity

    def by_certificate(self, names: Iterable[str]) -> Identity:
        """Return the identity of the certificate with these names. Raises IdentityError."""
        table = self._table.get().by_certificate
        found = {table[name] for name in names if name in table}
        if len({identity.who for identity in found}) != 1:
            raise IdentityError(
                "the certificate names several identities"
                if found
                else "send 'authorization: Bearer TOKEN', or a certificate that is known here"
            )
        return min(found)

    def knows(self, identity: Identity) -> bool:
        """Return whether the file still has this identity, with this proof."""
        table, proof = self._table.get(), identity.proof
        known = (
            table.by_digest.get(proof)
            if isinstance(proof, bytes)
            else table.by_certificate.get(proof)
        )
        return known == identity


def is_open(rpc: str) -> bool:
    """Return whether `rpc`, as "/package.Service/Method", is open to everybody."""
    return rpc.startswith(OPEN_SERVICES)


def insist_role(rpc: str, identity: Identity) -> None:
    """Raise RoleError unless the identity's role may call `rpc`."""
    if identity.role not in ROLES.get(rpc, ()):
        raise RoleError(rpc.rpartition("/")[2], identity.role)


def insist_still_known() -> None:
    """Raise IdentityError if the caller's proof was struck off the token file."""
    if not STILL_KNOWN.get()():
        raise IdentityError("this token or certificate is not known here any more")


def acts_as_operator(said: bool, rpc: str) -> bool:
    """Return whether the caller is an operator. Where callers need no identity, who says so is.

    Raises RoleError for somebody else who says so.
    """
    caller = CALLER.get()
    if caller is None:
        return said
    if said and caller.role is not Role.OPERATOR:
        raise RoleError(f"{rpc} by_operator", caller.role)
    return caller.role is Role.OPERATOR


def may_see(spec: PoolSpec) -> bool:
    """Return whether the caller may know of the pool."""
    return may_see_of(spec.owner)


def may_see_of(owner: str) -> bool:
    """Return whether the caller may know of the pools of `owner`: it is the owner or an operator.

    Where callers need no identity, everybody may.
    """
    caller = CALLER.get()
    return caller is None or caller.role is Role.OPERATOR or caller.name == owner


def claimed(spec: PoolSpec, before: PoolSpec | None) -> PoolSpec:
    """Return `spec` with its owner: the caller, who opens the pool that `before` describes.

    A closed pool keeps its owner. A pool without an owner, opened where callers need no identity,
    is open to everybody. Raises PoolForeignError.
    """
    caller, owner = CALLER.get(), before.owner if before else ""
    if caller is None:
        return replace(spec, owner=owner)
    if owner not in {"", caller.name}:
        raise PoolForeignError(spec.name)
    return replace(spec, owner=caller.name)


# --- the token file ---


def _read(file: Path) -> _Table:
    try:
        content = tomllib.loads(read_file(file, private=True).decode())
    except ValueError:  # the message of this error would quote the file
        raise OdmaError(f"{file} is no TOML file") from None
    entries = content.pop("identity", [])
    if content or not isinstance(entries, list):
        raise OdmaError(f"{file}: only [[identity]] tables are known")
    if not 1 <= len(entries) <= MOST_IDENTITIES:
        raise OdmaError(f"{file}: 1 to {MOST_IDENTITIES:,} identities, not {len(entries):,}")
    table = _Table({}, {})
    for number, entry in enumerate(entries, 1):
        try:
            _add(table, entry)
        except ValueError as error:
            raise OdmaError(f"{file}: identity {number}: {error}") from None
    return table


def _add(table: _Table, entry: Mapping[str, Any]) -> None:
    """Add an identity. Raises ValueError; its message never quotes a secret."""
    unknown = set(entry) - {"name", "role", *PROOFS}
    if unknown:
        raise ValueError(f"unknown key {min(unknown)!r}; known are name, role, {', '.join(PROOFS)}")
    if not all(isinstance(value, str) for value in entry.values()):
        raise ValueError("every value is a text")
    if not NAME.fullmatch(entry.get("name", "")):
        raise ValueError(f"name: {NAME_RULE}")
    if entry.get("role") not in set(Role):
        raise ValueError(f"role: one of {', '.join(Role)}")
    proofs = [proof for proof in PROOFS if proof in entry]
    if len(proofs) != 1:
        raise ValueError(f"one of {', '.join(PROOFS)} is needed")
    identity = Identity(entry["name"], Role(entry["role"]))
    if "certificate" in entry:
        _put(table.by_certificate, entry["certificate"], identity)
    else:
        _put(table.by_digest, _digest_of(entry), identity)


def _digest_of(entry: Mapping[str, str]) -> bytes:
    if "token" in entry:
        if not TOKEN.fullmatch(entry["token"]):
            raise ValueError("token: 16 to 512 visible ASCII characters, without spaces")
        return sha256(entry["token"].encode()).digest()
    if not DIGEST.fullmatch(entry["token-sha256"]):
        raise ValueError("token-sha256: 64 lower-case hexadecimal digits")
    return bytes.fromhex(entry["token-sha256"])


def _put(known: dict[Proof, Identity], proof: Proof, identity: Identity) -> None:
    if not proof or proof in known:
        raise ValueError("its token or certificate is empty, or another identity's")
    known[proof] = identity._replace(proof=proof)
