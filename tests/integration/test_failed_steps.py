"""A step that fails costs its requests their attempt; a device that is lost ends the node."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import NamedTuple

import pytest
import torch
from drive import load_tiny
from live_nodes import Client, check, client, first, node_settings, reports
from nats_server import NatsServer
from tiny_models import make_tiny_model
from torch import Tensor

from flowkv.roles import ROLES
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.errors import Internal, Unavailable
from flowkv_common.wire.messages import NodeRef
from flowkv_engine.engine.batch import PackedBatch
from flowkv_engine.engine.model import LoadedModel
from flowkv_engine.engine.runner import DeviceLost, EngineThread, Runner
from flowkv_node.host import serve_node, served_model

PROMPT = [5] * 20


class BreakingRunner(Runner):
    """Raises `errors`, one a step, before it computes again."""

    def __init__(self, model: LoadedModel, pool: Tensor, errors: list[Exception]) -> None:
        self.errors = errors
        super().__init__(model, pool)

    def _logits(self, batch: PackedBatch) -> Tensor:
        if self.errors:
            raise self.errors.pop(0)
        return super()._logits(batch)


class Setup(NamedTuple):
    bus: Bus
    client: Client
    node: NodeRef
    errors: list[Exception]
    served: asyncio.Task[None]

    async def generate(self, max_tokens: int) -> list[int]:
        return await self.client.generate(self.node, self.node, PROMPT, max_tokens=max_tokens)


@pytest.fixture
async def setup(nats_server: NatsServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Setup]:
    model = load_tiny(make_tiny_model(tmp_path_factory.mktemp("model")))
    settings = node_settings(nats_server, model, "n")
    errors: list[Exception] = []

    def make_engine(pool: Tensor) -> EngineThread:
        return EngineThread(BreakingRunner(model, pool, errors))

    breaking = dataclasses.replace(served_model(model, settings), make_engine=make_engine)
    stop = asyncio.Event()
    async with AsyncExitStack() as opened:
        bus = await opened.enter_async_context(connect(nats_server.url, name="test"))
        heard = await opened.enter_async_context(reports(bus, "n"))
        mine = await opened.enter_async_context(client(bus, model.card.fingerprint))
        task = asyncio.create_task(serve_node(settings, "mixed", breaking, ROLES, stop))
        node = (await first(heard, lambda report: report.ready)).node
        yield Setup(bus, mine, node, errors, task)
        stop.set()
        await asyncio.wait([task], timeout=10)
        assert task.done()


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a bug"), torch.OutOfMemoryError("CUDA out of memory")],
    ids=lambda error: type(error),
)
async def test_a_failed_step_costs_its_requests_alone(setup: Setup, error: Exception) -> None:
    expected = await setup.generate(4)
    setup.errors.append(error)
    with pytest.raises(Internal, match=str(error)):
        await setup.generate(4)
    assert await setup.generate(4) == expected
    async with asyncio.timeout(5):
        while (await check(setup.bus, "n")).blocks.leased:
            pass


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError("CUDA error: x"), RuntimeError("Triton Error [CUDA]: x")]
)
async def test_a_lost_device_ends_the_node_and_gives_its_work_back(setup: Setup, error: Exception) -> None:
    setup.errors.append(error)
    with pytest.raises(Unavailable, match="is lost"):
        await setup.generate(4)
    async with asyncio.timeout(10):
        with pytest.raises(DeviceLost, match=re.escape(str(error))):
            await setup.served
