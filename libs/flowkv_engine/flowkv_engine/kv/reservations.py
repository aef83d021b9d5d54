"""Room that a decode node keeps for handoffs on their way. Every reservation has an owner, a secret, an end.

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
from flowkv_common.wire.messages import NodeRef
from flowkv_engine.kv.blocks import Blocks, OutOfBlocks


@dataclass(eq=False)
class Reservation:
    """Blocks kept for one transfer: first `num_cached_blocks` that hold their KV already, then empty ones."""

    transfer_id: str
    token: str = field(repr=False)
    block_ids: list[int]
    num_cached_blocks: int
    owner_gateway: str
    owner_node: NodeRef
    expires_at: float  # on the clock of `Reservations`
    num_copying: int = 0
    revoked: bool = False
    quarantined: list[int] = field(default_factory=list)  # to be settled when the last copy has stopped

    @property
    def cached_block_ids(self) -> list[int]:
        return self.block_ids[: self.num_cached_blocks]

    @property
    def empty_block_ids(self) -> list[int]:
        return self.block_ids[self.num_cached_blocks :]


class Reservations:
    """All open reservations of a node. Used from the asyncio loop alone, as `Blocks` is.

    One that has expired is open until `sweep`, which alone ends it for that: a node that hears nobody doesn't
    sweep, for its owner could not renew it.
    """

    def __init__(self, blocks: Blocks, clock: Callable[[], float] = time.monotonic) -> None:
        self._blocks = blocks
        self._clock = clock
        self._open: dict[str, Reservation] = {}
        self.renewed_at = clock()  # the last time that one was opened or extended

    @property
    def num_open(self) -> int:
        return len(self._open)

    def open(
        self,
        transfer_id: str,
        num_blocks: int,
        hashes: Sequence[str],
        like: Sequence[int],
        owner_gateway: str,
        owner_node: NodeRef,
        expires_in_s: float,
        *,
        room: int = 0,
    ) -> Reservation:
        """Keeps `num_blocks` blocks: the cached prefix of the chain `hashes`, the rest in runs like `like`.

        `like` are the lengths of the sender's runs over all `num_blocks`; `room` is that of `Blocks.take`.
        Raises `OutOfBlocks`, `Stale` if the transfer has a reservation, `BadRequest` without blocks.
        """
        if num_blocks < 1:
            raise BadRequest("a reservation needs at least one block", field="num_tokens")
        if transfer_id in self._open:
            raise Stale(f"transfer {transfer_id} has a reservation already")
        cached = self._blocks.match_prefix(hashes[:num_blocks])
        try:
            num_missing = num_blocks - len(cached)
            empty = self._blocks.take(num_missing, like=_behind(like, len(cached)), room=room)
        except OutOfBlocks:
            self._blocks.release(cached)
            raise
        reservation = Reservation(
            transfer_id=transfer_id,
            token=secrets.token_hex(16),
            block_ids=cached + empty,
            num_cached_blocks=len(cached),
            owner_gateway=owner_gateway,
            owner_node=owner_node,
            expires_at=self._clock() + expires_in_s,
        )
        self._open[transfer_id] = reservation
        self.renewed_at = self._clock()
        return reservation

    def __contains__(self, transfer_id: str) -> bool:
        return transfer_id in self._open

    def extend(self, transfer_id: str, token: str, expires_in_s: float) -> Reservation:
        """Lets it expire `expires_in_s` from now. Raises `Stale` if it has ended or the token is wrong."""
        reservation = self._opened(transfer_id, token)
        self.renewed_at = self._clock()
        reservation.expires_at = self.renewed_at + expires_in_s
        return reservation

    def claim(self, transfer_id: str, token: str) -> Reservation:
        """Ends the reservation; its blocks, leased, belong to the caller.

        Raises `Stale` if it has ended, the token is wrong or a copy is still writing.
        """
        reservation = self._opened(transfer_id, token)
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
            reservation.quarantined = self._blocks.quarantine(reservation.empty_block_ids)
        else:
            self._blocks.release(reservation.empty_block_ids)

    def cancel_where(self, predicate: Callable[[Reservation], bool]) -> list[str]:
        """Cancels all that `predicate` holds for and returns their transfer ids."""
        chosen = [name for name, reservation in self._open.items() if predicate(reservation)]
        for transfer_id in chosen:
            self.cancel(transfer_id)
        return chosen

    def sweep(self) -> list[str]:
        """Cancels the expired and returns their transfer ids, for a timer (docs/architecture.md, rule 4)."""
        now = self._clock()
        return self.cancel_where(lambda reservation: reservation.expires_at <= now)

    @contextmanager
    def landing(self, transfer_id: str, token: str, dst_blocks: Sequence[int]) -> Iterator[Reservation]:
        """Guards one copy into `dst_blocks`. Whoever copies must stop once `revoked` is set, then leave.

        Raises `Stale` if the reservation has ended or the token is wrong, `BadRequest` if a block is not one
        of its empty ones.
        """
        reservation = self._opened(transfer_id, token)
        if not set(dst_blocks) <= set(reservation.empty_block_ids):
            raise BadRequest(f"transfer {transfer_id} writes blocks that are not reserved for it")
        reservation.num_copying += 1
        try:
            yield reservation
        finally:
            reservation.num_copying -= 1
            if reservation.revoked and not reservation.num_copying:
                self._blocks.settle(reservation.quarantined)

    def _opened(self, transfer_id: str, token: str) -> Reservation:
        reservation = self._open.get(transfer_id)
        if reservation is None:
            raise Stale(f"transfer {transfer_id} has no reservation, or it has expired")
        if not hmac.compare_digest(token.encode(), reservation.token.encode()):
            raise Stale(f"wrong token for transfer {transfer_id}")
        return reservation


def _behind(lengths: Sequence[int], skipped: int) -> list[int]:
    """Run lengths that remain of `lengths` when the first `skipped` blocks are left out."""
    remaining = []
    for length in lengths:
        left_out = min(length, skipped)
        skipped -= left_out
        if length > left_out:
            remaining.append(length - left_out)
    return remaining
