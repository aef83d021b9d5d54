"""Nodes that prefill for each other don't wait in a circle for each other's blocks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from flowkv_common.bus.connection import Bus
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import NodeRef, Release, Reserve
from flowkv_engine.engine.model import LoadedModel
from flowkv_prefill import prompts
from tests.live_nodes import BLOCK_SIZE, Client, check, client, first, live_node, reports
from tests.nats_server import NatsServer
from tests.oracle import check_identity

NUM_BLOCKS = 12
LONG_PROMPT = (NUM_BLOCKS - 2) * BLOCK_SIZE  # leaves no room for another in the pool


class Pair(NamedTuple):
    bus: Bus
    client: Client
    a: NodeRef
    b: NodeRef

    async def both_idle(self) -> bool:
        """After their integrity checks."""
        books = [await check(self.bus, node.node_id) for node in (self.a, self.b)]
        return all((b.num_requests, b.num_reservations, b.blocks.leased) == (0, 0, 0) for b in books)


@pytest.fixture
async def pair(nats_server: NatsServer, bus: Bus, model: LoadedModel) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as opened:
        a, b = [
            await opened.enter_async_context(
                live_node(nats_server, bus, model, node_id, num_blocks=NUM_BLOCKS, peers=peers)
            )
            for node_id, peers in (("a", 0), ("b", 1))
        ]
        yield Pair(bus, await opened.enter_async_context(client(bus, model.card.fingerprint)), a, b)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    # Much less than the 80 short steps that one test waits for, on a fast machine too.
    monkeypatch.setattr(prompts, "FIRST_PATIENCE_S", 0.005)


class Overheard:
    """What is asked of a node, by a look at its subject."""

    def __init__(self) -> None:
        self.num = 0
        self._news = asyncio.Event()

    def __call__(self, *_: object) -> None:
        self.num += 1
        self._news.set()

    async def wait_for(self, num: int) -> None:
        async with asyncio.timeout(10):
            while self.num < num:
                self._news.clear()
                await self._news.wait()


@pytest.mark.usefixtures("impatient")
async def test_who_waits_in_vain_gives_its_reservation_back(pair: Pair, model_path: Path) -> None:
    released, asked = Overheard(), Overheard()
    held = await pair.client.reserve(pair.a, LONG_PROMPT, "other.0")  # nearly all of its blocks
    prompt_ids = random.Random(1).choices(range(20, 500), k=LONG_PROMPT)
    async with (
        await pair.bus.subscribe(subjects.at(subjects.DECODE_RELEASE, "b"), Release, released),
        await pair.bus.subscribe(subjects.at(subjects.DECODE_RESERVE, "b"), Reserve, asked),
        reports(pair.bus, "b") as heard,
        asyncio.TaskGroup() as tasks,
    ):
        output = tasks.create_task(pair.client.generate(pair.a, pair.b, prompt_ids, max_tokens=5))
        # It gives way again and again, and comes back each time.
        await released.wait_for(2)
        await asked.wait_for(3)
        assert not output.done()
        await pair.client.release(pair.a, held)
        taken_on = await first(heard, lambda report: report.num_sequences_accepted > 0)
    assert taken_on.num_rooms_given == 1  # however often it came back
    assert len(output.result()) == 5
    check_identity(model_path, prompt_ids, output.result())
    assert await pair.both_idle()


@pytest.mark.usefixtures("impatient")
async def test_who_waits_for_no_other_node_keeps_its_reservation(pair: Pair) -> None:
    """A's blocks are held by what A itself runs, which ends without anybody's help."""
    released, asked = Overheard(), Overheard()
    async with (
        await pair.bus.subscribe(subjects.at(subjects.DECODE_RELEASE, "b"), Release, released),
        await pair.bus.subscribe(subjects.at(subjects.DECODE_RESERVE, "b"), Reserve, asked),
        asyncio.TaskGroup() as tasks,
    ):
        here = tasks.create_task(pair.client.generate(pair.a, pair.a, [30] * 8, max_tokens=80))
        there = tasks.create_task(pair.client.generate(pair.a, pair.b, [31] * LONG_PROMPT, max_tokens=2))
    assert (len(here.result()), len(there.result())) == (80, 2)
    assert asked.num > 1  # it has waited, and renewed
    assert released.num == 0


async def test_two_small_nodes_that_prefill_for_each_other_finish_all(pair: Pair, model_path: Path) -> None:
    rng = random.Random(2)
    lengths = [LONG_PROMPT, LONG_PROMPT // 2, LONG_PROMPT, 20, LONG_PROMPT]
    prompts = [rng.choices(range(20, 500), k=length) for length in lengths for _ in range(2)]
    async with asyncio.TaskGroup() as tasks:
        outputs = [
            tasks.create_task(pair.client.generate(*nodes, prompt_ids, max_tokens=6))
            for prompt_ids, nodes in zip(prompts, [(pair.a, pair.b), (pair.b, pair.a)] * 5, strict=True)
        ]
    for prompt_ids, output in zip(prompts, outputs, strict=True):
        assert len(output.result()) == 6
        check_identity(model_path, prompt_ids, output.result())
    assert await pair.both_idle()
