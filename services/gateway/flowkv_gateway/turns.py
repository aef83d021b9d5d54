"""Whose request is next: under load tenants share by the tokens that they were served.

Scheduler and prefill nodes serve requests in the order of their age. So of many requests of one tenant only
a few may be there, or another's first one would stand behind them all.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flowkv_gateway.tenants import Tenant


@dataclass(eq=False)
class Turn:
    """One request, until it has its first token. `num_tokens`: of its prompt."""

    turns: Turns  # that gave it
    tenant: Tenant
    num_tokens: int
    is_taken: bool = False  # it may ask the scheduler
    has_pair: bool = False
    admission: asyncio.Future[None] | None = None


class Turns:
    """Of the requests for one model.

    Those that have a turn fill the next step of the nodes: one prompt for each node that prefills, more of
    them up to so many tokens. While a tenant is expected the step is kept short, since a newcomer waits for
    its end. Of those that the scheduler lets wait it is one request per node.

    The next turn is that of the oldest request of the tenant that was served least. This tenant never waits
    for those before it: if none of its requests has a turn, one gets a turn beside them. A tenant that is
    alone is not held back.
    """

    def __init__(
        self,
        max_asking: Callable[[], int],
        num_steps: Callable[[], int],
        max_tokens: Callable[[bool], int],
    ) -> None:
        """`num_steps`: of nodes, at once. `max_tokens`: in all of these, if they are to be short or not."""
        self._max_asking = max_asking
        self._num_steps = num_steps
        self._max_tokens = max_tokens
        self._taken: set[Turn] = set()
        self._waiting: dict[Tenant, dict[Turn, None]] = {}  # in the order in which they came
        self._numbers = itertools.count(1)

    @contextlib.contextmanager
    def turn(self, tenant: Tenant, num_tokens: int) -> Iterator[Turn]:
        """Around all that is done for a request. One that ends without a pair was not served."""
        turn = Turn(self, tenant, num_tokens)
        try:
            yield turn
        finally:
            if turn.is_taken and not turn.has_pair:
                tenant.served -= num_tokens
            self.end(turn)

    async def wait(self, turn: Turn) -> None:
        """Until `turn` may ask the scheduler: call it before each question."""
        if turn.is_taken or (not self._waiting and turn.tenant.is_alone()):
            return
        admission = turn.admission = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(turn.tenant, {})[turn] = None
        self._admit()
        try:
            await admission
        finally:
            self._forget(turn)

    def assign(self, turn: Turn) -> None:
        """It has got a pair: another may ask."""
        if not (turn.has_pair or turn.is_taken):
            turn.tenant.served += turn.num_tokens
        turn.has_pair = True
        self._admit()

    def end(self, turn: Turn) -> None:
        """It has got its first token, or has ended."""
        self._taken.discard(turn)
        self._admit()

    def _forget(self, turn: Turn) -> None:
        waiting = self._waiting.get(turn.tenant, {})
        waiting.pop(turn, None)
        if not waiting:
            self._waiting.pop(turn.tenant, None)

    def _admit(self) -> None:
        while self._waiting:
            tenant = min(self._waiting, key=lambda one: (one.served, one.last_turn))
            turn = next(iter(self._waiting[tenant]))
            assert turn.admission is not None
            if turn.admission.cancelled():  # it has not run since
                self._forget(turn)
                continue
            if not (self._has_room(tenant) or self._is_least_served(tenant) or tenant.is_alone()):
                return
            self._forget(turn)
            self._taken.add(turn)
            turn.is_taken = True
            tenant.last_turn = next(self._numbers)
            if not turn.has_pair:
                tenant.served += turn.num_tokens  # now, or it would be given all turns that there are
            turn.admission.set_result(None)

    def _has_room(self, tenant: Tenant) -> bool:
        num_asking = sum(not turn.has_pair for turn in self._taken)
        num_tokens = sum(turn.num_tokens for turn in self._taken)
        most = self._max_tokens(tenant.expects_another(self._waiting))
        has_room_in_step = len(self._taken) < self._num_steps() or num_tokens < most
        return num_asking < self._max_asking() and has_room_in_step

    def _is_least_served(self, tenant: Tenant) -> bool:
        """Also of those that have a turn, with none itself."""
        others = [turn.tenant for turn in self._taken]
        return tenant not in others and all(tenant.served <= other.served for other in others)
