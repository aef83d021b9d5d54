"""Which handoffs make progress, in each of their stages, and what is said of those that don't."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from flowkv_node.handoffs import (
    SLOWEST_LINK_BYTES_PER_S,
    STUCK_AFTER_S,
    HandoffBudget,
    InFlight,
    Stage,
)


class Time:
    """A clock, and when something has last moved at the node."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.node_moved_at = 1000.0

    def budget(self) -> HandoffBudget:
        return HandoffBudget(4, 1000, node_moved_at=lambda: self.node_moved_at, clock=lambda: self.now)


async def test_the_budget_is_held_while_the_context_lasts() -> None:
    budget = Time().budget()
    async with budget.hold("a.0", "d", 700), budget.hold("b.0", "d", 200):
        assert (budget.queue.num_holders, budget.queue.weight_held) == (2, 900)
    assert (budget.queue.num_holders, budget.queue.weight_held, budget.queue.num_waiting) == (0, 0, 0)


async def test_late_prompts_have_a_budget_of_their_own() -> None:
    budget = Time().budget()
    async with budget.hold("a.0", "d", 1000, is_late=True), budget.hold("b.0", "d", 1000):
        assert (budget.num_in_flight, budget.bytes_in_flight) == (2, 2000)
        for is_late in (True, False):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01), budget.hold("c.0", "d", 1, is_late=is_late):
                    pass
    assert (budget.num_in_flight, budget.bytes_in_flight) == (0, 0)


Move = Callable[[HandoffBudget, InFlight, Time], None]


def step_ends(_: HandoffBudget, __: InFlight, time: Time) -> None:
    time.node_moved_at = time.now


def decode_answers(budget: HandoffBudget, _: InFlight, __: Time) -> None:
    budget.hear_decode_node("d")


def another_decode_answers(budget: HandoffBudget, _: InFlight, __: Time) -> None:
    budget.hear_decode_node("another")


def send_confirmed(budget: HandoffBudget, _: InFlight, __: Time) -> None:
    budget.confirm_send("d")


def send_to_another_confirmed(budget: HandoffBudget, _: InFlight, __: Time) -> None:
    budget.confirm_send("another")


def comes_to_the_same_stage(_: HandoffBudget, mine: InFlight, __: Time) -> None:
    mine.enter(mine.stage)


def comes_to_the_next_stage(_: HandoffBudget, mine: InFlight, __: Time) -> None:
    mine.enter(Stage.SENDING if mine.stage is not Stage.SENDING else Stage.RESERVING)


PROGRESS: dict[Stage, set[Move]] = {
    Stage.RESERVING: {decode_answers, comes_to_the_next_stage},
    Stage.WAITING: {step_ends, comes_to_the_next_stage},
    Stage.COMPUTING: {step_ends, comes_to_the_next_stage},
    Stage.SENDING: {send_confirmed, comes_to_the_next_stage},
}
MOVES = [
    step_ends,
    decode_answers,
    another_decode_answers,
    send_confirmed,
    send_to_another_confirmed,
    comes_to_the_same_stage,
    comes_to_the_next_stage,
]


@pytest.mark.parametrize("stage", list(Stage), ids=lambda stage: stage.name)
@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
async def test_what_is_progress_in_a_stage(stage: Stage, move: Move) -> None:
    time = Time()
    budget = time.budget()
    async with budget.hold("r.0", "d", 0) as mine:
        mine.enter(stage)
        time.now += STUCK_AFTER_S
        assert budget.why_stuck() is None
        move(budget, mine, time)
        time.now += 1
        is_stuck = move not in PROGRESS[stage]
        assert budget.find_stuck() == ([mine] if is_stuck else [])
        assert (budget.why_stuck() is not None) == is_stuck
    assert budget.why_stuck() is None


async def test_the_sentence_names_the_one_that_is_stuck_for_longest() -> None:
    time = Time()
    budget = time.budget()
    async with budget.hold("a.0", "d", 0) as first:
        first.enter(Stage.SENDING)
        time.now += 30
        async with budget.hold("b.0", "d", 0), budget.hold("c.0", "other", 0):
            time.now += STUCK_AFTER_S + 1
            budget.hear_decode_node("other")
            assert budget.why_stuck() == ("no progress in 2 of 3 handoffs: a.0 is handed over for 211 s")


async def test_many_bytes_may_take_long_on_a_slow_link() -> None:
    time = Time()
    budget = HandoffBudget(1, 1 << 40, node_moved_at=lambda: 0.0, clock=lambda: time.now)
    async with budget.hold("r.0", "d", 1 << 34) as mine:
        mine.enter(Stage.SENDING)
        time.now += STUCK_AFTER_S + (1 << 34) / SLOWEST_LINK_BYTES_PER_S
        assert budget.find_stuck() == []
        time.now += 1
        assert budget.find_stuck() == [mine]
