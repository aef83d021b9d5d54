"""Tenants that come, go and are served in any order, against a list that is searched anew for each turn."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from flowkv_gateway.tenants import Tenant, Tenants
from flowkv_gateway.turns import Turns

NUM_TOKENS = st.integers(1, 50)
TENANT = st.sampled_from("abc")
NTH = st.integers(0, 9)
SHORT, WHOLE = 60, 120  # tokens
NUM_STEPS = 3


class Join(NamedTuple):
    tenant: str
    num_tokens: int


class GetPair(NamedTuple):
    """The n-th of those that ask, if there are so many."""

    nth: int


class FirstToken(NamedTuple):
    """The n-th of those with a pair, if there are so many."""

    nth: int


class Cancel(NamedTuple):
    """The n-th of those that ask or wait, if there are so many."""

    nth: int


class Serve(NamedTuple):
    """Tokens of answers."""

    tenant: str
    num_tokens: int


Action = Join | GetPair | FirstToken | Cancel | Serve
ACTIONS = st.lists(
    st.one_of(
        st.builds(Join, TENANT, NUM_TOKENS),
        st.builds(GetPair, NTH),
        st.builds(FirstToken, NTH),
        st.builds(Cancel, NTH),
        st.builds(Serve, TENANT, NUM_TOKENS),
    ),
    max_size=40,
)


@dataclass(eq=False)
class Asker:
    number: int
    tenant: str
    num_tokens: int
    has_pair: asyncio.Event = field(default_factory=asyncio.Event)
    has_token: asyncio.Event = field(default_factory=asyncio.Event)


class Model:
    """The rules, word by word. Who asks, who waits, and what each tenant was served."""

    def __init__(self, max_asking: int) -> None:
        self.max_asking = max_asking
        self.asking: list[Asker] = []
        self.computed: list[Asker] = []  # with a pair
        self.waiting: list[Asker] = []
        self.served = dict.fromkeys("abc", 0.0)
        self.last_turn = dict.fromkeys("abc", 0)
        self.order: list[int] = []

    def admit(self) -> None:
        while self.waiting:
            key = min({one.tenant for one in self.waiting}, key=lambda t: (self.served[t], self.last_turn[t]))
            taken = self.asking + self.computed
            rivals = [one.tenant for one in taken]
            is_behind = key not in rivals and all(self.served[key] <= self.served[one] for one in rivals)
            num_tokens = sum(one.num_tokens for one in taken)
            # Any tenant that does not wait may ask at any moment.
            is_expected = len({key, *(one.tenant for one in self.waiting)}) < len("abc")
            most = SHORT if is_expected else WHOLE
            has_room_in_step = len(taken) < NUM_STEPS or num_tokens < most
            has_room = len(self.asking) < self.max_asking and has_room_in_step
            if not (has_room or is_behind):
                return
            asker = next(one for one in self.waiting if one.tenant == key)
            self.waiting.remove(asker)
            self.asking.append(asker)
            self.order.append(asker.number)
            self.served[key] += asker.num_tokens
            self.last_turn[key] = len(self.order)


class House:
    """The turns, and tasks that take them."""

    def __init__(self, max_asking: int) -> None:
        # The clock stands: all were here a minute ago at the latest.
        tenants = Tenants(0, 0, clock=lambda: 0.0)
        self.by_name: dict[str, Tenant] = {name: tenants.find(name) for name in "abc"}
        self.turns = Turns(lambda: max_asking, lambda: NUM_STEPS, lambda short: SHORT if short else WHOLE)
        self.order: list[int] = []
        self.tasks: dict[Asker, asyncio.Task[None]] = {}

    def join(self, tenant: str, num_tokens: int) -> Asker:
        asker = Asker(len(self.tasks), tenant, num_tokens)
        self.tasks[asker] = asyncio.create_task(self._ask(asker))
        return asker

    async def _ask(self, asker: Asker) -> None:
        with self.turns.turn(self.by_name[asker.tenant], asker.num_tokens) as turn:
            await self.turns.wait(turn)
            self.order.append(asker.number)
            await self.turns.wait(turn)  # a second question needs no second turn
            await asker.has_pair.wait()
            self.turns.assign(turn)
            await asker.has_token.wait()
            self.turns.end(turn)

    async def settle(self) -> None:
        for _ in range(6 * len(self.tasks) + 6):
            await asyncio.sleep(0)

    def is_empty(self) -> bool:
        return not self.turns._waiting and not self.turns._taken


@given(ACTIONS, st.integers(1, 3))
def test_the_next_is_always_of_the_tenant_that_was_served_least(
    actions: list[Action], max_asking: int
) -> None:
    asyncio.run(asyncio.wait_for(_play(actions, max_asking), 10))


async def _play(actions: list[Action], max_asking: int) -> None:
    house, model = House(max_asking), Model(max_asking)
    for action in actions:
        match action:
            case Join(tenant, num_tokens):
                model.waiting.append(house.join(tenant, num_tokens))
            case GetPair(nth) if nth < len(model.asking):
                asker = model.asking.pop(nth)
                model.computed.append(asker)
                asker.has_pair.set()
            case FirstToken(nth) if nth < len(model.computed):
                model.computed.pop(nth).has_token.set()
            case Cancel(nth) if nth < len(model.asking):
                asker = model.asking.pop(nth)
                model.served[asker.tenant] -= asker.num_tokens
                house.tasks[asker].cancel()
            case Cancel(nth) if nth < len(model.asking) + len(model.waiting):
                house.tasks[model.waiting.pop(nth - len(model.asking))].cancel()
            case Serve(tenant, num_tokens):
                house.by_name[tenant].add_tokens(num_tokens)
                model.served[tenant] += num_tokens
                continue  # the next look is at the next arrival or end
            case _:
                continue
        model.admit()
        await house.settle()
        assert house.order == model.order
        assert {name: one.served for name, one in house.by_name.items()} == model.served
    for task in house.tasks.values():
        task.cancel()
    await asyncio.gather(*house.tasks.values(), return_exceptions=True)
    assert house.is_empty()


@given(st.lists(st.tuples(TENANT, st.integers(0, 2), st.booleans()), max_size=30), st.integers(1, 3))
def test_cancels_in_the_same_tick_leave_nothing_behind(
    visits: list[tuple[str, int, bool]], max_asking: int
) -> None:
    asyncio.run(asyncio.wait_for(_cancel_in_one_tick(visits, max_asking), 10))


async def _cancel_in_one_tick(visits: list[tuple[str, int, bool]], max_asking: int) -> None:
    """Each visit: whose, ticks before the next, and whether it is cancelled when the pairs come."""
    house, cancelled = House(max_asking), set()
    for tenant, num_ticks, is_cancelled in visits:
        asker = house.join(tenant, 1)
        cancelled |= {asker} if is_cancelled else set()
        for _ in range(num_ticks):
            await asyncio.sleep(0)
    for asker, task in house.tasks.items():
        if asker in cancelled:
            task.cancel()
        asker.has_pair.set()
        asker.has_token.set()
    await asyncio.wait(house.tasks.values()) if house.tasks else None
    assert {asker for asker, task in house.tasks.items() if task.cancelled()} == cancelled
    assert house.is_empty()
    served = sum(one.served for one in house.by_name.values())
    assert served == len(house.tasks) - len(cancelled)
