"""The one hash of KV blocks: equal hash, equal tokens from the start of the prompt, equal model."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b


def block_hashes(
    fingerprint: str, token_ids: Sequence[int], block_size: int, known: Sequence[str] = ()
) -> list[str]:
    """Hashes of the *full* blocks of `token_ids`, each chained to the one before (32 hex digits each).

    The chain starts at the model's fingerprint, so caches of different weights never meet. `known` are the
    first of them, if the caller has those already.
    """
    hashes = list(known)
    for end in range((len(hashes) + 1) * block_size, len(token_ids) + 1, block_size):
        parent = hashes[-1] if hashes else None
        hashes.append(chained_hash(fingerprint, parent, token_ids[end - block_size : end]))
    return hashes


def chained_hash(fingerprint: str, parent: str | None, block: Sequence[int]) -> str:
    """The hash of one full block behind the block of hash `parent`, or of a first block."""
    digest = blake2b(fingerprint.encode() if parent is None else bytes.fromhex(parent), digest_size=16)
    digest.update(array("I", block).tobytes())
    return digest.hexdigest()
