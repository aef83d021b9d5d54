"""Handoffs in flight have a budget of their own, in count and in bytes, and each must make progress.

| a handoff | has made progress when |
| --- | --- |
| asks for room at the decode node | that node answers, be it that it is full |
| waits for blocks of its own | a step ends at this node, blocks come back, or a reservation here is renewed |
| is computed | a step ends at this node, whoever is in it |
| is handed over | a send to its decode node is confirmed, whichever handoff's |

Each of these waits has a deadline of its own, of seconds; joining a communicator, within a send, may take two
minutes. So a handoff that has made no progress for three, and for as long as a slow link takes for its bytes,
waits for something that has failed without a word.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from enum import StrEnum

from flowkv_common.aio import FairQueue

STUCK_AFTER_S = 180.0
SLOWEST_LINK_BYTES_PER_S = 10e6


class Stage(StrEnum):
    """Where a handoff stands."""

    RESERVING = "asks for room at the decode node"
    WAITING = "waits for blocks"
    COMPUTING = "is computed"
    SENDING = "is handed over"


class InFlight:
    """A handoff that holds its part of the budget. `moved_at` is when it last made progress by itself."""

    def __init__(
        self, transfer_id: str, decode_node_id: str, num_bytes: int, clock: Callable[[], float]
    ) -> None:
        self.transfer_id = transfer_id
        self.decode_node_id = decode_node_id
        self.stage = Stage.RESERVING
        self.moved_at = clock()
        self.patience_s = STUCK_AFTER_S + num_bytes / SLOWEST_LINK_BYTES_PER_S
        self._clock = clock

    def enter(self, stage: Stage) -> None:
        """It has come to another stage, or is still in this one."""
        if stage is not self.stage:
            self.stage = stage
            self.moved_at = self._clock()

    def hear_decode_node(self) -> None:
        """The decode node has answered. That is progress only for a handoff that waits for nothing else."""
        if self.stage is Stage.RESERVING:
            self.moved_at = self._clock()


class HandoffBudget:
    """First come, first served; a handoff larger than the whole budget goes alone.

    `node_moved_at` tells when, on `clock`, a step has last ended at this node, blocks have come back or a
    reservation was renewed.
    """

    def __init__(
        self,
        max_handoffs: int,
        max_bytes: int,
        *,
        node_moved_at: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = FairQueue(max_handoffs, max_bytes)
        self._in_flight: set[InFlight] = set()
        self._node_moved_at = node_moved_at
        self._clock = clock

    @property
    def num_in_flight(self) -> int:
        return self._queue.num_holders

    @property
    def bytes_in_flight(self) -> int:
        return self._queue.weight_held

    @property
    def num_waiting(self) -> int:
        return self._queue.num_waiting

    @contextlib.asynccontextmanager
    async def hold(self, transfer_id: str, decode_node_id: str, num_bytes: int) -> AsyncIterator[InFlight]:
        """Waits for room, then holds `num_bytes` of it while the context lasts."""
        async with self._queue.hold(num_bytes):
            mine = InFlight(transfer_id, decode_node_id, num_bytes, self._clock)
            self._in_flight.add(mine)
            try:
                yield mine
            finally:
                self._in_flight.discard(mine)

    def confirm_send(self, decode_node_id: str) -> None:
        """Blocks have landed at that node: all that are handed over to it have made progress."""
        now = self._clock()
        for handoff in self._in_flight:
            if handoff.stage is Stage.SENDING and handoff.decode_node_id == decode_node_id:
                handoff.moved_at = now

    def find_stuck(self) -> list[InFlight]:
        """Handoffs that have made no progress for too long (docs/architecture.md, rule 10)."""
        return [handoff for handoff in self._in_flight if self._still_s(handoff) > handoff.patience_s]

    def why_stuck(self) -> str | None:
        """In one sentence which handoffs make no progress; None if all do."""
        stuck = self.find_stuck()
        if not stuck:
            return None
        worst = max(stuck, key=self._still_s)
        return (
            f"no progress in {len(stuck)} of {self.num_in_flight} handoffs: {worst.transfer_id} "
            f"{worst.stage} for {self._still_s(worst):.0f} s"
        )

    def _still_s(self, handoff: InFlight) -> float:
        """Seconds without progress."""
        moved_at = handoff.moved_at
        if handoff.stage in (Stage.WAITING, Stage.COMPUTING):
            moved_at = max(moved_at, self._node_moved_at())
        return self._clock() - moved_at
