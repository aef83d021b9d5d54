"""Handoffs in flight have a budget of their own, in count and in bytes, and each must make progress.

| a handoff | has made progress when |
| --- | --- |
| asks for room at the decode node | that node answers any that asks it, even if only that it is full |
| waits for blocks here | a step ends at this node, blocks come back, or a reservation here is renewed |
| is computed | any step ends at this node |
| is handed over | a send to its decode node is confirmed, also another handoff's |

Each of these waits has a deadline of seconds; joining a communicator, within a send, may take two minutes. So
a handoff that has made no progress for three, and for as long as a slow link takes for its bytes, waits for
something that has failed without a word.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import StrEnum
from weakref import WeakValueDictionary

from flowkv_common.aio import FairQueue
from flowkv_common.config import NodeSettings
from flowkv_common.wire.messages import PoolLayout

STUCK_AFTER_S = 180.0
SLOWEST_LINK_BYTES_PER_S = 10e6


def handoff_bytes(settings: NodeSettings, layout: PoolLayout, num_blocks: int) -> int:
    """How many bytes of KV a prefill node with a pool of `num_blocks` may have in flight.

    Handoffs in flight hold blocks at both ends, at the decode node before they are computed. So it is a share
    of the pool: decode nodes have pools of the same kind. A quarter lets a long prompt be sent while the next
    ones compute; with as much again of late prompts it leaves decode half. In small pools it is a step's
    prompt tokens for each handoff in flight: there the count is the bound.
    """
    if settings.max_handoff_bytes:
        return settings.max_handoff_bytes
    blocks_per_step = -(-settings.token_budget // settings.block_size)
    return max(num_blocks // 4, settings.max_handoffs * blocks_per_step) * layout.block_bytes


class Stage(StrEnum):
    """Where a handoff stands."""

    RESERVING = "asks for room at the decode node"
    WAITING = "waits for blocks"
    COMPUTING = "is computed"
    SENDING = "is handed over"


@dataclass(slots=True, eq=False)
class InFlight:
    """A handoff that holds its part of the budget."""

    transfer_id: str
    decode_node_id: str
    due: float  # the first token, on the monotonic clock
    patience_s: float
    clock: Callable[[], float]
    moved_at: float  # when it last made progress by itself
    stage: Stage = Stage.RESERVING

    def enter(self, stage: Stage) -> None:
        """It has come to another stage, or is still in this one."""
        if stage is not self.stage:
            self.stage, self.moved_at = stage, self.clock()

    def still_s(self) -> float:
        """Seconds without progress by itself."""
        return self.clock() - self.moved_at


class HandoffBudget:
    """The handoff that is due first goes first; one larger than the whole budget goes alone.

    Prompts in time interrupt late ones, so these must not keep them out: they have a budget of their own.

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
        self.queue = FairQueue(max_handoffs, max_bytes)  # counts handoffs in flight, their bytes, and waiters
        self.late_queue = FairQueue(max_handoffs, max_bytes)
        self._in_flight: set[InFlight] = set()
        # By decode node, while any handoff stands in it.
        self._lines: WeakValueDictionary[str, FairQueue] = WeakValueDictionary()
        self._node_moved_at = node_moved_at
        self._clock = clock

    @contextlib.asynccontextmanager
    async def hold(
        self,
        transfer_id: str,
        decode_node_id: str,
        num_bytes: int,
        *,
        due: float = 0.0,
        is_late: bool = False,
    ) -> AsyncIterator[InFlight]:
        """Waits for room, then holds `num_bytes` of it while the context lasts."""
        queue = self.late_queue if is_late else self.queue
        async with queue.hold(num_bytes, place=due):
            patience_s = STUCK_AFTER_S + num_bytes / SLOWEST_LINK_BYTES_PER_S
            mine = InFlight(transfer_id, decode_node_id, due, patience_s, self._clock, self._clock())
            self._in_flight.add(mine)
            try:
                yield mine
            finally:
                self._in_flight.discard(mine)

    @property
    def num_in_flight(self) -> int:
        return self.queue.num_holders + self.late_queue.num_holders

    @property
    def bytes_in_flight(self) -> int:
        return self.queue.weight_held + self.late_queue.weight_held

    def line_to(self, decode_node_id: str) -> FairQueue:
        """Of the handoffs that want room at that node. Its holder asks, so that the one due first gets it."""
        return self._lines.setdefault(decode_node_id, FairQueue(max_holders=1))

    def hear_decode_node(self, decode_node_id: str) -> None:
        """That node has answered: all that want room there have made progress."""
        self._move_all(Stage.RESERVING, decode_node_id)

    def confirm_send(self, decode_node_id: str) -> None:
        """Blocks have landed at that node: all that are handed over to it have made progress."""
        self._move_all(Stage.SENDING, decode_node_id)

    def _move_all(self, stage: Stage, decode_node_id: str) -> None:
        now = self._clock()
        for handoff in self._in_flight:
            if handoff.stage is stage and handoff.decode_node_id == decode_node_id:
                handoff.moved_at = now

    def find_stuck(self) -> list[InFlight]:
        """Handoffs without progress for too long (docs/architecture.md, rule 10), the worst first."""
        stuck = [handoff for handoff in self._in_flight if self._still_s(handoff) > handoff.patience_s]
        return sorted(stuck, key=self._still_s, reverse=True)

    def why_stuck(self) -> str | None:
        """In one sentence which handoffs make no progress; None if all do."""
        if not (stuck := self.find_stuck()):
            return None
        return (
            f"no progress in {len(stuck)} of {self.num_in_flight} handoffs: {stuck[0].transfer_id} "
            f"{stuck[0].stage} for {self._still_s(stuck[0]):.0f} s"
        )

    def _still_s(self, handoff: InFlight) -> float:
        """Seconds without progress."""
        moved_at = handoff.moved_at
        if handoff.stage in (Stage.WAITING, Stage.COMPUTING):
            moved_at = max(moved_at, self._node_moved_at())
        return self._clock() - moved_at
