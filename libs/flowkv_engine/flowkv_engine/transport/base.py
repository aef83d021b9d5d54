"""What a transport of KV blocks promises, whichever it is; `tests/contract` holds them all to it.

A connector receives into its own pool and opens links that send out of it. The bytes of a confirmed
`send_blocks` have landed; those of a failed or cancelled one may have, in reserved blocks only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

from flowkv_engine.kv.segments import Copy


class ConnectorUnavailable(Exception):
    """This transport can't be had between the two nodes; the message says why."""


class TransferStats(NamedTuple):
    """What one `send_blocks` took. `num_calls`: calls of the transport (system calls, memory copies)."""

    num_bytes: int
    num_copies: int
    num_calls: int


class KVLink(Protocol):
    """A way into one peer's pool. One transfer at a time; others wait their turn."""

    @property
    def name(self) -> str:
        """That of the connector."""

    @property
    def is_lost(self) -> bool:
        """Whether the last send could not reach the peer by this transport. Another transport may."""

    async def send_blocks(self, transfer_id: str, token: str, copies: Sequence[Copy]) -> TransferStats:
        """Returns when the receiver has confirmed that all bytes landed.

        The caller's blocks hold their bytes: if they were computed on a device, it has finished.

        Raises `TransferFailed`. Cancelling the awaiting task aborts the transfer; the link stays usable, it
        reconnects on the next send if it has to.
        """

    async def close(self) -> None:
        """Ends the link, after the transfer under way. Idempotent."""


class KVConnector(AbstractAsyncContextManager["KVConnector"], Protocol):
    """One transport of one node. Serves its peers while its `async with` block lasts."""

    @property
    def name(self) -> str:
        """As in `FLOWKV_CONNECTORS`."""

    @property
    def connect_timeout_s(self) -> float:
        """How long `connect` may take before it is given up."""

    async def listen(self) -> str:
        """Begins to serve; returns the address that peers connect to. Raises `OSError`."""

    async def connect(self, address: str, token: str, num_blocks: int) -> KVLink:
        """A link to the peer that listens at `address` with a pool of `num_blocks` blocks.

        `token` is the secret that the peer has given out for links. The link has been probed: raises
        `ConnectorUnavailable` if the peer can't be reached this way or refuses.
        """


def find_stray(copies: Iterable[Copy], num_src_blocks: int, num_dst_blocks: int) -> Copy | None:
    """The first copy that reaches out of either pool, or moves more than the whole of one, or None."""
    num_moved = 0
    for copy in copies:
        num_moved += copy.length
        fits = 0 <= copy.src <= num_src_blocks - copy.length and 0 <= copy.dst <= num_dst_blocks - copy.length
        if copy.length < 1 or not fits or num_moved > num_dst_blocks:
            return copy
    return None
