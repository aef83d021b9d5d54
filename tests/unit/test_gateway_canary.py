"""`/health/deep` asks nodes at most once per period, and says of each pair what it did."""

from __future__ import annotations

import asyncio

from flowkv_common.errors import TransferFailed
from flowkv_gateway import canary
from flowkv_gateway.canary import Canary
from tests.gateway_support import ScriptedDispatch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_pairs_are_tried_once_per_period_however_many_ask() -> None:
    dispatch, clock = ScriptedDispatch(pairs={("p0", "d0"): None, ("p0", "d1"): None}), Clock()
    asked = Canary(dispatch, clock)
    async with asyncio.TaskGroup() as tasks:
        answers = [tasks.create_task(asked.health()) for _ in range(5)]
    assert {(answer.result().ok, answer.result().num_pairs) for answer in answers} == {(True, 2)}
    assert sorted(dispatch.tried) == [("p0", "d0"), ("p0", "d1")]
    clock.now += canary.PERIOD_S - 1
    assert (await asked.health()).age_s == canary.PERIOD_S - 1
    assert len(dispatch.tried) == 2
    clock.now += 1
    assert (await asked.health()).age_s == 0.0
    assert len(dispatch.tried) == 4


async def test_one_pair_that_fails_makes_the_whole_unwell() -> None:
    dispatch = ScriptedDispatch(pairs={("p0", "d0"): None, ("p0", "d1"): TransferFailed("d1: no link")})
    found = await Canary(dispatch).health()
    assert (found.ok, found.why_not) == (False, "1 of 2 pairs failed")
    assert [(pair.decode, pair.ok, pair.error) for pair in found.pairs] == [
        ("d0", True, None),
        ("d1", False, "d1: no link"),
    ]


async def test_without_a_pair_it_is_unwell() -> None:
    dispatch = ScriptedDispatch(pairs={})
    asked = Canary(dispatch)
    found = await asked.health()
    assert (found.ok, found.why_not, found.pairs) == (False, "no pair of nodes could serve a request", [])
    dispatch.pairs["p0", "d0"] = None  # the nodes have come: nothing was tried that could not be again
    assert (await asked.health()).ok


async def test_of_many_pairs_some_are_drawn() -> None:
    dispatch = ScriptedDispatch(pairs={(f"p{p}", f"d{d}"): None for p in range(20) for d in range(20)})
    found = await Canary(dispatch).health()
    assert (found.ok, found.num_pairs, len(found.pairs)) == (True, 400, canary.MAX_PAIRS)
    assert len(set(dispatch.tried)) == canary.MAX_PAIRS
