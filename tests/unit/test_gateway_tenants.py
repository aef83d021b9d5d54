"""What a key's name may use, and when its requests need turns."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv_gateway.errors import KeyLimit
from flowkv_gateway.tenants import PRESENT_S, Tenants
from flowkv_gateway.turns import Turns


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@given(
    st.integers(1, 10_000),
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500), st.floats(0, 100)), max_size=20),
)
def test_tokens_per_minute_hold_and_the_wait_is_true(
    per_minute: int, requests: list[tuple[int, int, float]]
) -> None:
    clock = Clock()
    tenant = Tenants(0, per_minute, clock).find("a")
    used, most = 0, 0
    for num_prompt, num_answer, pause_s in requests:
        clock.now += pause_s
        try:
            with tenant.open_request(num_prompt):
                tenant.add_tokens(num_answer)
        except KeyLimit as refused:
            now, wait_s = clock.now, refused.retry_after_s or 0.0
            clock.now = now + 0.99 * wait_s
            with pytest.raises(KeyLimit), tenant.open_request(0):
                pass
            clock.now = now + wait_s + 1e-6
            with tenant.open_request(0):
                pass
        else:
            used += num_prompt + num_answer
            most = max(most, num_prompt + num_answer)
        # What a minute allows from the start, what came in since, and one request that went over it.
        assert used <= per_minute * (1 + (clock.now - 100.0) / 60) + most


def test_open_requests_are_counted_until_they_end() -> None:
    clock = Clock()
    tenants = Tenants(2, 0, clock)
    tenant = tenants.find("a")
    with tenant.open_request(5):
        clock.now += 8.0
    with ExitStack() as opened:
        for _ in range(2):
            opened.enter_context(tenant.open_request(5))
        with pytest.raises(KeyLimit) as refused, tenant.open_request(5):
            pass
        assert refused.value.retry_after_s == 4.0, "two that take 8 s each: one ends in about four"
        with tenants.find("b").open_request(5):
            pass
    with tenant.open_request(5):
        pass


def test_a_pause_saves_up_no_share() -> None:
    tenants = Tenants(0, 0, Clock())
    busy, late = tenants.find("busy"), tenants.find("late")
    with busy.open_request(1):
        busy.add_tokens(1000)
        with late.open_request(1):
            assert late.served == 1000
            busy.add_tokens(50)
            with late.open_request(1):
                assert late.served == 1000, "it has not paused"
    assert busy.served == 1050


async def test_who_is_alone_needs_no_turn() -> None:
    clock = Clock()
    tenants = Tenants(0, 0, clock)
    alone, other = tenants.find("alone"), tenants.find("other")
    clock.now += PRESENT_S
    turns = Turns(lambda: 1, lambda: 1, lambda _: 100)
    with alone.open_request(1), ExitStack() as opened:
        asking = [opened.enter_context(turns.turn(alone, 1)) for _ in range(4)]
        for turn in asking:
            await turns.wait(turn)
        with other.open_request(1):
            pass
        await turns.wait(asking[0])
        second = asyncio.create_task(turns.wait(asking[1]))
        await asyncio.sleep(0)
        assert not second.done(), "another was here: they ask in turn"
        clock.now += PRESENT_S
        third = asyncio.create_task(turns.wait(asking[2]))
        await asyncio.gather(second, third)
