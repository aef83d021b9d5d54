"""The prompt that is due first comes first on its prefill node, whatever it waits for."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.aio import FairQueue
from flowkv_common.wire.messages import SamplingParams
from flowkv_common.wire.nodes import num_attended
from flowkv_engine.engine.batch import Sequence
from flowkv_node.steps import plan_step
from flowkv_prefill import prompts
from tests.engineless import BLOCK_SIZE, NUM_BLOCKS, Pair, engineless_pair, kv_of
from tests.nats_server import NatsServer
from tests.waiting import until

LATE, SOON = 60.0, 1.0


async def accept(pair: Pair, num_tokens: int, due_in_s: float, interruptible_for_s: float = 0.0) -> list[int]:
    """Returns the prompt's token ids."""
    prompt_ids = [100 + int(due_in_s) % 100] * num_tokens
    run = pair.run(prompt_ids)
    await pair.p.prefill.accept(
        msgspec.structs.replace(run, due_in_s=due_in_s, interruptible_for_s=interruptible_for_s)
    )
    return prompt_ids


def computing(pair: Pair) -> list[list[int]]:
    """The prompts that have blocks, the next one first."""
    return [sequence.prompt_ids for sequence in pair.p.prefill.sequences_to_prefill()]


async def test_a_late_prompt_is_interrupted_and_ends_as_if_it_had_not_been(pair: Pair) -> None:
    late = await accept(pair, 41, LATE)
    await pair.compute(2 * BLOCK_SIZE)
    soon = await accept(pair, 10, SOON)
    await until(lambda: computing(pair) == [soon, late])
    assert pair.step(2 * BLOCK_SIZE) == 2 * BLOCK_SIZE
    # What the end of the one leaves of the step is for the other.
    assert pair.step(2 * BLOCK_SIZE) == 2 + BLOCK_SIZE
    assert computing(pair) == [late]
    await pair.d.wait_accepted(1)
    await pair.compute_all(2 * BLOCK_SIZE)
    await pair.d.wait_accepted(2)
    first, second = pair.d.decode.sequences_to_decode()
    for sequence, prompt_ids in ((first, soon), (second, late)):
        assert pair.d.kv(sequence.block_table, len(prompt_ids)) == kv_of(prompt_ids)
    assert set(pair.link.times_sent().values()) == {1}


async def test_its_load_tells_what_prompts_in_time_come_before(pair: Pair) -> None:
    """A late prompt until it is due as soon as they are, and no longer than it is not computed."""
    await accept(pair, 10, SOON)
    await accept(pair, 20, LATE, interruptible_for_s=1e-9)  # over at once
    await accept(pair, 41, LATE + 1.0, interruptible_for_s=LATE)
    load = pair.p.prefill.load()
    assert (load.queued_prefill_tokens, load.interruptible_prefill_tokens) == (71, 41)
    attended = [num_attended(num) for num in (10, 20, 41)]
    assert (load.queued_attended, load.interruptible_attended) == (sum(attended), attended[-1])
    await until(lambda: len(pair.p.prefill.not_computed()) == 3)
    left = 71
    while num_computed := pair.step(2 * BLOCK_SIZE):
        left -= num_computed
        load = pair.p.prefill.load()
        assert (load.queued_prefill_tokens, load.interruptible_prefill_tokens) == (left, min(left, 41))
    assert left == 0


async def test_a_late_prompt_makes_no_step_of_one_in_time_longer(pair: Pair) -> None:
    late = await accept(pair, 41, LATE, interruptible_for_s=LATE)
    await pair.compute(2 * BLOCK_SIZE)
    await accept(pair, 20, LATE + 1.0, interruptible_for_s=LATE)
    await until(lambda: len(computing(pair)) == 2)
    soon = await accept(pair, 10, SOON)
    await until(lambda: computing(pair) == [soon])
    # Another node could begin the second of the late ones, too.
    assert len(pair.p.node.prompts_not_begun()) == 2
    assert pair.step(1000) == 10
    assert computing(pair)[0] == late
    assert pair.step(1000) == 41 - 2 * BLOCK_SIZE + 20


async def test_a_prompt_that_was_late_for_long_comes_before_newcomers(pair: Pair) -> None:
    """So it does not starve: what it is due by is a time."""
    old = await accept(pair, 10, -5.0)
    new = await accept(pair, 10, SOON)
    await until(lambda: computing(pair) == [old, new])


async def test_the_one_that_is_due_first_gets_the_next_blocks(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait behind a later one that waits for more, though that came first."""
    monkeypatch.setattr(prompts, "ROOM_RETRY_S", 1e9)  # nothing but the newcomer makes it look again
    hog = pair.p.node.blocks.allocate(NUM_BLOCKS - 4)
    late = await accept(pair, 6 * BLOCK_SIZE, LATE)
    await until(lambda: pair.p.prefill._block_queue.num_holders)
    soon = await accept(pair, 2 * BLOCK_SIZE, SOON)
    await until(lambda: computing(pair) == [soon])
    # A small one that is due later does not take what the first waits for.
    await accept(pair, 1, 2 * LATE)
    await until(lambda: pair.p.prefill._block_queue.num_waiting)
    await pair.settle()
    assert computing(pair) == [soon]
    pair.p.node.blocks.release(hog)
    pair.p.node.notice_room()
    await until(lambda: len(computing(pair)) == 3)
    assert computing(pair)[:2] == [soon, late]


async def test_the_one_that_is_due_first_gets_the_next_place_among_handoffs(nats_server: NatsServer) -> None:
    async with engineless_pair(nats_server, max_handoffs=1) as pair:
        first = await accept(pair, 5, SOON)
        await until(lambda: computing(pair) == [first])
        await accept(pair, 6, LATE)
        soon = await accept(pair, 7, SOON)
        await until(lambda: pair.p.node.handoffs.queue.num_waiting == 2)
        await pair.compute()
        await until(lambda: computing(pair) == [soon])


async def test_a_late_prompt_keeps_none_in_time_out_of_the_handoffs(nats_server: NatsServer) -> None:
    """However long it is: they interrupt it."""
    async with engineless_pair(nats_server, max_handoff_bytes=1) as pair:  # each goes alone
        late = await accept(pair, 41, LATE, interruptible_for_s=LATE)
        await until(lambda: computing(pair) == [late])
        await accept(pair, 20, LATE, interruptible_for_s=LATE)
        soon = await accept(pair, 10, SOON)
        await until(lambda: computing(pair) == [soon])
        await pair.compute()
        await until(lambda: computing(pair) == [late])


def test_preempted_sequences_are_computed_before_prompts() -> None:
    """Their clients have seen output."""

    def sequence(name: str) -> Sequence:
        return Sequence(name, "g", [1] * 32, [], SamplingParams(max_tokens=8), deadline=0.0)

    def role(*waiting: Sequence) -> Any:
        return SimpleNamespace(
            sequences_to_prefill=lambda: waiting, sequences_to_decode=list, drafts=lambda running: running
        )

    prompt, preempted = sequence("prompt"), sequence("preempted")
    node: Any = SimpleNamespace(
        prefill=role(prompt),
        decode=role(preempted),
        settings=SimpleNamespace(token_budget=48, block_size=16),
        max_prefill_tokens_per_step=48,
    )
    assert [(item.sequence, item.num_tokens) for _, item in plan_step(node)] == [
        (preempted, 32),
        (prompt, 16),
    ]


# Prompts that come at once, by when they are due, and how many of those that are there get room then.
BURSTS = st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 4)), max_size=10)


@given(BURSTS)
def test_the_next_is_the_smallest_place_and_all_come_in(bursts: list[tuple[list[int], int]]) -> None:
    """Beside a sorted list. Who is overtaken while it holds gives way, and comes back to its own place."""

    async def run() -> None:
        queue, look, rooms = FairQueue(max_holders=1), asyncio.Condition(), list[bool]()
        served: list[int] = []

        async def serve(place: int) -> None:
            has_room = False
            while not has_room:
                async with queue.hold(place=place), look:
                    await look.wait_for(lambda: rooms or queue.is_overtaken(place))
                    if not queue.is_overtaken(place):
                        has_room = bool(rooms.pop())
                        served.append(place)

        async def look_again() -> None:
            for _ in range(8):  # who gives way, who comes, who leaves
                async with look:
                    look.notify_all()
                await asyncio.sleep(0)

        waiting: list[int] = []
        expected: list[int] = []
        async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
            for places, num_rooms in [*bursts, ([], 40)]:
                for place in places:
                    tasks.create_task(serve(place))
                waiting = sorted([*waiting, *places])
                await look_again()
                for _ in range(min(num_rooms, len(waiting))):
                    expected.append(waiting.pop(0))
                    rooms.append(True)
                    await look_again()
                assert served == expected

    asyncio.run(run())
