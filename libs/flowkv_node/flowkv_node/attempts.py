"""Which attempts live on this node, and which are over for good. Knows neither blocks nor tokens.

A cancel may overtake the message that it cancels, so an attempt that has ended leaves a tombstone for
longer than any request's deadline (docs/architecture.md, rule 2).
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto

from flowkv_common.errors import Stale

TOMBSTONE_S = 3600.0
# A bound of some 25 MB. At more cancels than these in an hour the oldest tombstones go before their time.
MAX_TOMBSTONES = 100_000


class Cause(Enum):
    """Why an attempt is stopped before it has ended by itself."""

    UNWANTED = auto()  # its gateway has found a stop string, or its client has left
    GATEWAY_GONE = auto()
    NEWER_ATTEMPT = auto()  # of the same request
    GIVEN_BACK = auto()  # to its gateway, by a node that can't go on with it


@dataclass(slots=True)
class Attempt:
    """One attempt on this node. `state` is shown to the gateway; `stop` frees all that the attempt holds."""

    transfer_id: str
    gateway_id: str
    state: str
    stop: Callable[[Cause], None]


class Attempts:
    """The attempts of this node by transfer id. All methods are idempotent where their name allows it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._live: dict[str, Attempt] = {}
        # transfer_id -> when to forget; oldest first. A dict would be slow to be taken from at that end.
        self._tombstones: OrderedDict[str, float] = OrderedDict()
        self._news = asyncio.Event()

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Attempt]:
        return iter(list(self._live.values()))

    def __contains__(self, transfer_id: str) -> bool:
        return transfer_id in self._live

    def find(self, transfer_id: str) -> Attempt | None:
        return self._live.get(transfer_id)

    def refuse_ended(self, transfer_id: str) -> None:
        """Raises Stale if this attempt, or a later one of the same request, has been here and gone."""
        if transfer_id in self._tombstones:
            raise Stale(f"attempt {transfer_id} has ended")
        request_id, _, number = transfer_id.rpartition(".")
        if f"{request_id}.{int(number) + 1}" in self._live:
            raise Stale(f"attempt {transfer_id} is older than the one that runs")

    def begin(self, attempt: Attempt) -> None:
        """Note an attempt; it takes the place of its own earlier phase, and ends older attempts.

        Raises Stale if it was cancelled before it came.
        """
        self.refuse_ended(attempt.transfer_id)
        request_id, _, number = attempt.transfer_id.rpartition(".")
        for older in range(int(number)):
            self.cancel(f"{request_id}.{older}", Cause.NEWER_ATTEMPT)
        self._live[attempt.transfer_id] = attempt

    def set_state(self, transfer_id: str, state: str) -> None:
        if attempt := self._live.get(transfer_id):
            attempt.state = state

    def end(self, transfer_id: str) -> None:
        """The attempt is over on this node by itself; a late cancel finds nothing to do."""
        self._live.pop(transfer_id, None)
        self._news.set()

    async def wait_empty(self) -> None:
        """Until no attempt lives here."""
        while self._live:
            self._news.clear()
            await self._news.wait()

    def cancel(self, transfer_id: str, cause: Cause) -> None:
        """Stop the attempt if it is here, and refuse it if it comes later."""
        self._bury(transfer_id)
        if attempt := self._live.pop(transfer_id, None):
            attempt.stop(cause)
            self._news.set()

    def cancel_gateway(self, gateway_id: str) -> int:
        """Stop all attempts of a gateway that is gone; gives their number."""
        mine = [attempt for attempt in self if attempt.gateway_id == gateway_id]
        for attempt in mine:
            self.cancel(attempt.transfer_id, Cause.GATEWAY_GONE)
        return len(mine)

    def states_by_gateway(self) -> dict[str, dict[str, str]]:
        """gateway_id -> transfer_id -> state."""
        states: dict[str, dict[str, str]] = {}
        for attempt in self._live.values():
            states.setdefault(attempt.gateway_id, {})[attempt.transfer_id] = attempt.state
        return states

    def _bury(self, transfer_id: str) -> None:
        """Takes the same time however many there are."""
        now, tombstones = self._clock(), self._tombstones
        tombstones[transfer_id] = now + TOMBSTONE_S
        tombstones.move_to_end(transfer_id)
        while len(tombstones) > MAX_TOMBSTONES or tombstones[next(iter(tombstones))] <= now:
            tombstones.popitem(last=False)
