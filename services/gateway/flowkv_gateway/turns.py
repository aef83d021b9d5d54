"""Whose request asks the scheduler next: under load tenants share by the tokens that they were served.

The scheduler serves those that wait in the order of their age. So of many requests of one tenant only a few
may wait there, or another's first one would stand behind them all.
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
    """One request that wants a pair of nodes. `num_tokens`: of its prompt."""

    tenant: Tenant
    num_tokens: int
    is_asking: bool = False
    admission: asyncio.Future[None] | None = None


class Turns:
    """At most `max_asking` requests ask; the next is always the oldest of the tenant that was served least.

    That tenant never waits for those before it: if none of its requests asks, one may beside them. A tenant
    that is alone is not held back.
    """

    def __init__(self, max_asking: Callable[[], int]) -> None:
        self._max_asking = max_asking
        self._asking: set[Turn] = set()
        self._waiting: dict[Tenant, dict[Turn, None]] = {}  # in the order in which they came
        self._numbers = itertools.count(1)

    @contextlib.contextmanager
    def turn(self, tenant: Tenant, num_tokens: int) -> Iterator[Turn]:
        """Around all questions of a request, until it has a pair: then its prompt counts as served."""
        turn = Turn(tenant, num_tokens)
        try:
            yield turn
            if not turn.is_asking:
                tenant.served += num_tokens
        except BaseException:
            if turn.is_asking:
                tenant.served -= num_tokens
            raise
        finally:
            self._asking.discard(turn)
            self._admit()

    async def wait(self, turn: Turn) -> None:
        """Until `turn` may ask: call it before each question."""
        if turn.is_asking or (not self._waiting and turn.tenant.is_alone()):
            return
        admission = turn.admission = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(turn.tenant, {})[turn] = None
        self._admit()
        try:
            await admission
        finally:
            self._forget(turn)

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
            has_room = len(self._asking) < self._max_asking() or tenant.is_alone()
            if not has_room and any(
                other.tenant is tenant or other.tenant.served < tenant.served for other in self._asking
            ):
                return
            self._forget(turn)
            self._asking.add(turn)
            turn.is_asking = True
            tenant.last_turn = next(self._numbers)
            tenant.served += turn.num_tokens  # now, or it would be given all turns that there are
            turn.admission.set_result(None)
