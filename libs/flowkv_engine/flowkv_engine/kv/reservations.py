"""Blocks that a decode node keeps for handoffs on their way. Every reservation has a secret and an end.

Blocks of a reservation that ends under a copy are quarantined until the last copy has stopped.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from flowkv_common.errors import BadRequest, Stale
from flowkv_engine.kv.blocks import Blocks, OutOfBlocks


@dataclass(eq=False)
class Reservation:
    """Blocks kept for one transfer: first `num_cached_blocks` that hold their KV already, then empty ones.

    Once `revoked`, nothing more may be written into them.
    """

    transfer_id: str
    token: str = field(repr=False)
    block_ids: list[int]
    num_cached_blocks: int
    expires_at: float  # on the clock of `Reservations`
    num_copying: int = 0
    revoked: bool = False

    @property
    def cached_block_ids(self) -> list[int]:
        return self.block_ids[: self.num_cached_blocks]

    @property
    def empty_block_ids(self) -> list[int]:
        return self.block_ids[self.num_cached_blocks :]


class Reservations:
    """All open reservations of a node. Used from the event loop alone, as `Blocks` is.

    An expired reservation stays open until `sweep`: a node that is cut off from the bus does not sweep, since
    the owner could not renew.
    """

    def __init__(self, blocks: Blocks, clock: Callable[[], float] = time.monotonic) -> None:
        self._blocks = blocks
        self._clock = clock
        self._open: dict[str, Reservation] = {}
        self.renewed_at = clock()  # the last time that one was made or extended

    @property
    def num_open(self) -> int:
        return len(self._open)

    def reserve(
        self,
        transfer_id: str,
        num_blocks: int,
        hashes: Sequence[str],
        like: Sequence[int],
        expires_in_s: float,
        *,
        room: int = 0,
    ) -> Reservation:
        """Keeps `num_blocks` blocks: the cached prefix of the chain `hashes`, the rest in runs like `like`.

        `like` are the lengths of the sender's runs over all `num_blocks`; `room` is as in `Blocks.allocate`.
        Raises `OutOfBlocks`, `Stale` if the transfer has a reservation, `BadRequest` without blocks.
        """
        if num_blocks < 1:
            raise BadRequest("a reservation needs at least one block", field="num_tokens")
        if transfer_id in self._open:
            raise Stale(f"transfer {transfer_id} has a reservation already")
        cached = self._blocks.match_prefix(hashes[:num_blocks])
        num_skipped, like_behind = len(cached), []
        for length in like:  # leave the cached blocks out
            num_skipped -= (skipped := min(length, num_skipped))
            like_behind.append(length - skipped)
        try:
            empty = self._blocks.allocate(num_blocks - len(cached), like=like_behind, room=room)
        except OutOfBlocks:
            self._blocks.release(cached)
            raise
        self.renewed_at = self._clock()
        self._open[transfer_id] = Reservation(
            transfer_id=transfer_id,
            token=secrets.token_hex(16),
            block_ids=cached + empty,
            num_cached_blocks=len(cached),
            expires_at=self.renewed_at + expires_in_s,
        )
        return self._open[transfer_id]

    def extend(self, transfer_id: str, token: str, expires_in_s: float) -> Reservation:
        """Lets it expire `expires_in_s` from now. Raises `Stale` if it has ended or the token is wrong."""
        reservation = self._find(transfer_id, token)
        self.renewed_at = self._clock()
        reservation.expires_at = self.renewed_at + expires_in_s
        return reservation

    @contextmanager
    def copying(self, transfer_id: str, token: str, dst_blocks: Sequence[int]) -> Iterator[Reservation]:
        """Guards one copy into `dst_blocks`, which must stop once `revoked` is set.

        Raises `Stale` if the reservation has ended or the token is wrong, `BadRequest` if a block is not one
        of its empty ones.
        """
        reservation = self._find(transfer_id, token)
        if not set(dst_blocks) <= set(reservation.empty_block_ids):
            raise BadRequest(f"transfer {transfer_id} writes blocks that are not reserved for it")
        reservation.num_copying += 1
        try:
            yield reservation
        finally:
            reservation.num_copying -= 1
            if reservation.revoked and not reservation.num_copying:
                self._blocks.settle(reservation.empty_block_ids)

    def claim(self, transfer_id: str, token: str) -> Reservation:
        """Ends the reservation; its blocks, leased, belong to the caller.

        Raises `Stale` if it has ended, the token is wrong or a copy is still writing.
        """
        reservation = self._find(transfer_id, token)
        if reservation.num_copying:
            raise Stale(f"transfer {transfer_id} is still copying")
        del self._open[transfer_id]
        return reservation

    def cancel(self, transfer_id: str) -> None:
        """Ends the reservation and frees its blocks, those under a copy when it has stopped. Idempotent."""
        reservation = self._open.pop(transfer_id, None)
        if reservation is None:
            return
        reservation.revoked = True
        self._blocks.release(reservation.cached_block_ids)
        if reservation.num_copying:
            self._blocks.quarantine(reservation.empty_block_ids)
        else:
            self._blocks.release(reservation.empty_block_ids)

    def sweep(self) -> list[str]:
        """Cancels the expired and returns their transfer ids, for a timer (docs/architecture.md, rule 4)."""
        now = self._clock()
        expired = [name for name, reservation in self._open.items() if reservation.expires_at <= now]
        for transfer_id in expired:
            self.cancel(transfer_id)
        return expired

    def _find(self, transfer_id: str, token: str) -> Reservation:
        reservation = self._open.get(transfer_id)
        if reservation is None:
            raise Stale(f"transfer {transfer_id} has no reservation, or it has expired")
        if not hmac.compare_digest(token.encode(), reservation.token.encode()):
            raise Stale(f"wrong token for transfer {transfer_id}")
        return reservation
