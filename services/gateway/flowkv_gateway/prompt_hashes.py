"""The block hashes of a request, by which the scheduler sees who has computed its beginning already."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from flowkv_common.wire.hashing import block_hashes

# Of a longer prompt the beginning will do.
MAX_HASHES = 16_384
# So many take a few milliseconds; the event loop must not stand still for more.
MAX_HASHES_IN_LOOP = 1000


class HashBasis(NamedTuple):
    """What equal tokens must have in common to have equal hashes."""

    fingerprint: str
    block_size: int


class PromptHashes:
    """Of one request, whose tokens only grow: no block is hashed twice."""

    def __init__(self, max_hashes: int = MAX_HASHES) -> None:
        """`max_hashes` is what one message can carry; never more than `MAX_HASHES`."""
        self._max_hashes = min(max_hashes, MAX_HASHES)
        self._basis: HashBasis | None = None
        self._hashes: list[str] = []

    async def of(self, token_ids: Sequence[int], basis: HashBasis) -> list[str]:
        """One hash for each full block, of the first so many."""
        known = self._hashes if basis == self._basis else []
        num_blocks = min(len(token_ids) // basis.block_size, self._max_hashes)
        if num_blocks > len(known):
            hashed = token_ids[: num_blocks * basis.block_size]
            known = await self._extended(known, hashed, basis, num_blocks - len(known))
        self._basis, self._hashes = basis, known
        return known

    async def _extended(
        self, known: list[str], token_ids: Sequence[int], basis: HashBasis, num_new: int
    ) -> list[str]:
        wanted = basis.fingerprint, token_ids, basis.block_size, known
        if num_new <= MAX_HASHES_IN_LOOP:
            return block_hashes(*wanted)
        return await asyncio.to_thread(block_hashes, *wanted)
