"""A step that takes far too long: prompts that wait behind it go elsewhere, if there is an elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from flowkv_common.aio import running
from flowkv_engine.engine.batch import PackedBatch
from flowkv_engine.engine.runner import Result
from flowkv_engine.engine.sampler import Sampled
from flowkv_node import host
from flowkv_node.measures import MIN_STEPS, StepCounts
from flowkv_node.steps import run_steps
from tests.described_nodes import descriptor
from tests.engineless import FIRST_TOKEN, Pair, engineless_pair
from tests.nats_server import NatsServer
from tests.waiting import until

PROMPT = list(range(100, 110))


class SlowEngine:
    """Each step lasts until `goes_on` is set."""

    def __init__(self) -> None:
        self.busy_since: float | None = None
        self.goes_on = asyncio.Event()

    async def step(self, batch: PackedBatch) -> Result:
        self.busy_since = time.monotonic()
        await self.goes_on.wait()
        self.busy_since = None
        return Result([Sampled(FIRST_TOKEN, None) if sample else None for sample in batch.samples])


@pytest.fixture
async def engine() -> SlowEngine:
    return SlowEngine()


@pytest.fixture
async def pair(
    nats_server: NatsServer, engine: SlowEngine, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pair]:
    """Node `p` has measured steps of a millisecond, and now computes a prompt for ever."""
    monkeypatch.setattr(host, "SUPERVISE_PERIOD_S", 0.01)
    monkeypatch.setattr(host, "SHORTEST_STALL_S", 0.1)
    async with engineless_pair(nats_server) as pair:
        node = pair.p.node
        for _ in range(MIN_STEPS):
            node.instruments.observe_step(StepCounts(10, 55, 0, 0), 0.001)
        held: Any = engine
        async with running(run_steps(node, held), host.supervise(node, held)):
            await accept(pair)
            await until(lambda: engine.busy_since)
            yield pair


async def accept(pair: Pair) -> None:
    """A prompt for which `p` serves both halves."""
    await pair.p.prefill.accept(msgspec.structs.replace(pair.run(PROMPT), decode=pair.p.node.ref))


def others(pair: Pair, role: str) -> None:
    """Besides `d` there is one more node, of this role."""
    d = descriptor("d", "decode", incarnation=pair.d.node.ref.incarnation)
    pair.p.node.links.follow({"d": d, "q": descriptor("q", role)})


async def test_prompts_that_wait_go_elsewhere_and_the_node_recovers(pair: Pair, engine: SlowEngine) -> None:
    node = pair.p.node
    for _ in range(2):
        await accept(pair)
    others(pair, "prefill")
    await until(lambda: len(pair.chunks) == 2)
    assert node.why_not_ready() == "a step takes far longer than it should"
    assert {chunk.transfer_id for chunk in pair.chunks} == {"r1.0", "r2.0"}
    assert {chunk.error.code for chunk in pair.chunks if chunk.error} == {503}
    assert [attempt.transfer_id for attempt in node.attempts] == ["r0.0"]
    engine.goes_on.set()
    await until(lambda: node.why_not_ready() is None)
    await pair.p.wait_idle()
    assert {chunk.transfer_id for chunk in pair.chunks if not chunk.error} == {"r0.0"}


async def test_without_another_prefill_node_nothing_is_given_back(pair: Pair, engine: SlowEngine) -> None:
    await accept(pair)
    others(pair, "decode")
    began = engine.busy_since
    assert began is not None
    await until(lambda: time.monotonic() - began > 5 * host.SHORTEST_STALL_S)
    assert pair.p.node.why_not_ready() is None
    engine.goes_on.set()
    await pair.p.wait_idle()
    assert not any(chunk.error for chunk in pair.chunks)
