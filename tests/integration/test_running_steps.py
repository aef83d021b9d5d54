"""A step that runs while its sequences end: no block is free before the engine has stopped writing.

docs/architecture.md, rules 3 and 6.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from flowkv_common.bus.connection import Bus
from flowkv_common.errors import Unavailable
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import PrefillRun, Resume, transfer_id
from flowkv_engine.engine.batch import PackedBatch
from flowkv_engine.engine.runner import DeviceLost, Result
from flowkv_engine.engine.sampler import Sampled
from flowkv_node.steps import run_steps
from tests.engineless import FIRST_TOKEN, Pair, Side, engineless_pair
from tests.nats_server import NatsServer
from tests.waiting import soon, until

PROMPT = list(range(100, 110))


@dataclass
class HeldEngine:
    """Each step lasts until the test ends it."""

    steps: list[tuple[PackedBatch, asyncio.Future[Result]]] = field(default_factory=list)

    async def step(self, batch: PackedBatch) -> Result:
        self.steps.append((batch, asyncio.get_running_loop().create_future()))
        return await self.steps[-1][1]

    async def begun(self, num_steps: int) -> None:
        await until(lambda: len(self.steps) == num_steps)

    def end_step(self, error: Exception | None = None) -> None:
        batch, ends = self.steps[-1]
        if error:
            ends.set_exception(error)
        else:
            sampled = [Sampled(FIRST_TOKEN, None) if sample else None for sample in batch.samples]
            ends.set_result(Result(sampled))


@dataclass
class Computing:
    """Node `p` of the pair serves both halves of each request, with an engine that the test holds."""

    pair: Pair
    side: Side
    engine: HeldEngine
    steps: asyncio.Task[None]

    async def accept(self, max_tokens: int = 8) -> str:
        """Returns the transfer id."""
        asked = self.pair.run(PROMPT, max_tokens=max_tokens)
        run: PrefillRun = msgspec.structs.replace(asked, decode=self.side.node.ref)
        await self.side.prefill.accept(run)
        return transfer_id(run.request_id, run.attempt)


@pytest.fixture
async def computing(nats_server: NatsServer) -> AsyncIterator[Computing]:
    async with engineless_pair(nats_server) as pair:
        held: Any = HeldEngine()
        steps = asyncio.create_task(run_steps(pair.p.node, held))
        yield Computing(pair, pair.p, held, steps)
        steps.cancel()
        await asyncio.wait([steps], timeout=5)


@pytest.mark.parametrize("error", [None, RuntimeError("a bug")], ids=["done", "failed"])
@pytest.mark.parametrize("num_steps", [1, 2], ids=["prefill", "decode"])
async def test_blocks_of_a_cancelled_sequence_are_held_until_its_step_ends(
    computing: Computing, num_steps: int, error: Exception | None
) -> None:
    engine, side = computing.engine, computing.side
    tid = await computing.accept()
    await engine.begun(1)
    if num_steps == 2:
        engine.end_step()
        await engine.begun(2)
    num_held = side.node.blocks.num_leased
    side.node.attempts.cancel(tid)
    await computing.pair.settle()
    assert side.node.blocks.num_leased == num_held > 0
    engine.end_step(error)
    await side.wait_idle()


async def test_the_others_of_a_step_get_their_tokens(computing: Computing) -> None:
    engine, side = computing.engine, computing.side
    first = await computing.accept()
    await engine.begun(1)
    second, third = await computing.accept(), await computing.accept()
    await until(lambda: len(side.prefill.sequences_to_prefill()) == 3)
    engine.end_step()
    await engine.begun(2)
    assert len(engine.steps[1][0].samples) == 2  # the prompts; the sequence has not come to decode yet
    side.node.attempts.cancel(second)
    engine.end_step()
    await until(lambda: {chunk.transfer_id for chunk in computing.pair.chunks} == {first, third})


async def test_right_guesses_are_tokens_of_one_chunk(computing: Computing) -> None:
    engine, pair = computing.engine, computing.pair
    await computing.accept(max_tokens=64)
    num_steps = 0
    while all(len(chunk.token_ids) == 1 for chunk in pair.chunks):  # it learns what steps cost first
        num_steps += 1
        await engine.begun(num_steps)
        engine.end_step()
    place = next(place for place, chunk in enumerate(pair.chunks) if len(chunk.token_ids) > 1)
    *before, guessed = pair.chunks[: place + 1]
    assert [chunk.index for chunk in (*before, guessed)] == list(range(place + 1))
    assert all(chunk.token_ids == [FIRST_TOKEN] for chunk in before)
    drafted = [len(batch.samples) for batch, _ in engine.steps]
    assert len(guessed.token_ids) == next(number for number in drafted if number > 1)
    assert set(guessed.token_ids) == {FIRST_TOKEN}


async def test_blocks_that_a_lost_device_may_write_are_never_free(computing: Computing) -> None:
    await computing.accept()
    await computing.engine.begun(1)
    computing.engine.end_step(DeviceLost("gone"))
    with pytest.raises(DeviceLost):
        await soon(computing.steps)
    await computing.side.node.give_back(Unavailable("gone"))
    await computing.pair.settle()
    assert computing.side.node.blocks.num_leased > 0


async def test_tokens_that_can_not_be_sent_cost_no_step_and_can_be_asked_for(
    computing: Computing, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pair = computing.engine, computing.pair
    publish = Bus.publish
    failures = [RuntimeError("a bug of the client library")]

    async def publish_or_fail(bus: Bus, subject: str, *arguments: Any, **more: Any) -> None:
        if subject == subjects.tokens("g") and failures:
            raise failures.pop()
        await publish(bus, subject, *arguments, **more)

    tid = await computing.accept()
    await engine.begun(1)
    engine.end_step()
    await engine.begun(2)
    await until(lambda: len(pair.chunks) == 1)
    monkeypatch.setattr(Bus, "publish", publish_or_fail)
    engine.end_step()
    await engine.begun(3)  # while it computes, the token of the second one is sent
    await until(lambda: not failures)
    engine.end_step()
    await until(lambda: len(pair.chunks) == 2)
    assert [(chunk.index, chunk.error) for chunk in pair.chunks] == [(0, None), (2, None)]
    tail = await computing.side.decode.resume(Resume(transfer_id=tid, from_index=1))
    assert tail.chunk.token_ids == [FIRST_TOKEN, FIRST_TOKEN]
