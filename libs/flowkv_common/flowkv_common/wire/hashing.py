"""The one hash of KV blocks: equal hash, equal tokens from the start of the prompt, equal model."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b


def block_hashes(fingerprint: str, token_ids: Sequence[int], block_size: int) -> list[str]:
    """Hashes of the *full* blocks of `token_ids`, each chained to the one before (32 hex digits each).

    The chain starts at the model's fingerprint, so caches of different weights never meet.
    """
    hashes: list[str] = []
    parent = fingerprint.encode()
    for end in range(block_size, len(token_ids) + 1, block_size):
        digest = blake2b(parent, digest_size=16)
        digest.update(array("I", token_ids[end - block_size : end]).tobytes())
        parent = digest.digest()
        hashes.append(parent.hex())
    return hashes
