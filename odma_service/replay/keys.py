"""Keys: what an engine would compute of its tokens, from a trace's ids of blocks.

A key stands for all tokens from the first to the end of its granule, so each is a digest of the
key before it and of the ids of the blocks in which its granule lies. Blocks may be longer or
shorter than granules; only whole blocks have ids, so only what lies in them has keys.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from struct import pack

from odma_service.replay.load import BLOCK_TOKENS
from odma_service.values import KEY_BYTES

GRANULE_TOKENS = 64, 512
"""The smallest and the largest of a pool."""
MOST_KEYS = 4_096
MOST_BATCH_KEYS = 8_192


def granule_for(block_tokens: int) -> int:
    """Return the granule for a trace: its blocks, where a pool takes granules like them.

    >>> granule_for(16), granule_for(64), granule_for(512)
    (64, 64, 512)
    """
    least, most = GRANULE_TOKENS
    return min(max(block_tokens - block_tokens % BLOCK_TOKENS, least), most)


@lru_cache(maxsize=1_024)  # who is refused asks again
def keys_of(block_ids: tuple[int, ...], block_tokens: int, granule_tokens: int) -> bytes:
    """Return the keys of all whole granules in blocks with these ids."""
    keys = [b""]
    for index in range(len(block_ids) * block_tokens // granule_tokens):
        first = index * granule_tokens // block_tokens
        last = -(-(index + 1) * granule_tokens // block_tokens)
        ids = block_ids[first:last]
        chained = keys[-1] + pack(f"<{len(ids)}q", *ids)
        keys.append(blake2b(chained, digest_size=KEY_BYTES).digest())
    return b"".join(keys)
