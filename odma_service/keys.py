"""Keys: what stands for the beginning of a request, one for each granule.

Equal keys have to mean equal KV. So a key is chained over all tokens before it, and over a salt for
all else that the KV depends on. While the salt is secret, nobody makes the key of a guessed prompt.

    link 0   SHA-256 of the salt
    link n   SHA-256 of link n - 1 and granule n's tokens, 4 bytes each, the lowest first
    key n    the first KEY_BYTES bytes of link n

tests/client/keys.json has examples, for clients in other languages.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from hashlib import sha256

from odma_service.errors import InvalidError
from odma_service.values import KEY_BYTES


class KeyChain:
    """The keys of one request, made as its tokens come.

    >>> chain = KeyChain(64, b"secret")
    >>> chain.add(range(100)).hex()
    'd1f35352a5e38eccea36c63ae809ba27'
    >>> len(chain.add(range(28)))  # of 128 tokens
    32
    """

    def __init__(self, granule_tokens: int, salt: bytes) -> None:
        """Begin with no token. Raises InvalidError without granule_tokens."""
        if granule_tokens < 1:
            raise InvalidError("granule_tokens", f"at least 1, not {granule_tokens}")
        self._granule_tokens = granule_tokens
        self._link = sha256(salt).digest()
        self._begun = array("I")
        self.keys = b""
        """Of all whole granules so far, KEY_BYTES each."""

    def add(self, tokens: Iterable[int]) -> bytes:
        """Take the next tokens, 0 to 2^32 - 1 each, and return `keys`. Raises OverflowError."""
        self._begun.extend(array("I", tokens))
        size = self._granule_tokens
        whole = len(self._begun) // size * size
        for start in range(0, whole, size):
            granule = self._begun[start : start + size]
            if sys.byteorder == "big":
                granule.byteswap()
            self._link = sha256(self._link + granule.tobytes()).digest()
            self.keys += self._link[:KEY_BYTES]
        del self._begun[:whole]
        return self.keys


def chained_keys(tokens: Iterable[int], granule_tokens: int, salt: bytes) -> bytes:
    """Return the keys of the whole granules of `tokens`. Raises as KeyChain does."""
    return KeyChain(granule_tokens, salt).add(tokens)
