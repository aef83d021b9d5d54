"""A step that fails costs its requests their attempt; a device that is lost ends the node."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flowkv.roles import ROLES
from flowkv_common.bus.connection import Bus
from flowkv_common.errors import Internal, Unavailable
from flowkv_engine.engine.batch import PackedBatch
from flowkv_engine.engine.model import LoadedModel
from flowkv_engine.engine.runner import DeviceLost, EngineThread, Runner
from flowkv_engine.kv.pool import layer_views
from flowkv_node.host import serve_node, served_model
from tests.live_nodes import LiveNode, client, first, node_settings, reports
from tests.nats_server import NatsServer

PROMPT = [5] * 20


class BreakingRunner(Runner):
    """Raises `errors`, one a step, before it computes again."""

    def __init__(self, model: LoadedModel, pool: list[Tensor], errors: list[Exception]) -> None:
        self.errors = errors
        super().__init__(model, pool)

    def _logits(self, batch: PackedBatch) -> Tensor:
        if self.errors:
            raise self.errors.pop(0)
        return super()._logits(batch)


class Breaking(NamedTuple):
    node: LiveNode
    errors: list[Exception]
    served: asyncio.Task[None]

    async def generate(self) -> list[int]:
        return await self.node.generate(PROMPT, max_tokens=4)


@pytest.fixture
async def breaking(nats_server: NatsServer, bus: Bus, model: LoadedModel) -> AsyncIterator[Breaking]:
    settings = node_settings(nats_server, model, "n")
    errors: list[Exception] = []

    def make_engine(pool: Tensor) -> EngineThread:
        return EngineThread(BreakingRunner(model, layer_views(pool, served.layout), errors))

    served = served_model(model, settings)
    breaking = dataclasses.replace(served, make_engine=make_engine)
    stop = asyncio.Event()
    async with reports(bus, "n") as heard, client(bus, model.card.fingerprint) as mine:
        task = asyncio.create_task(serve_node(settings, "mixed", breaking, ROLES, stop))
        ref = (await first(heard, lambda report: report.ready)).node
        yield Breaking(LiveNode(bus, mine, ref, heard), errors, task)
        stop.set()
        await asyncio.wait([task], timeout=10)
        assert task.done()


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a bug"), torch.OutOfMemoryError("CUDA out of memory")],
    ids=lambda error: type(error),
)
async def test_a_failed_step_costs_its_requests_alone(breaking: Breaking, error: Exception) -> None:
    expected = await breaking.generate()
    breaking.errors.append(error)
    with pytest.raises(Internal, match=str(error)):
        await breaking.generate()
    assert await breaking.generate() == expected
    async with asyncio.timeout(5):
        while (await breaking.node.check()).blocks.leased:
            pass


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError("CUDA error: x"), RuntimeError("Triton Error [CUDA]: x")]
)
async def test_a_lost_device_ends_the_node_and_gives_its_work_back(
    breaking: Breaking, error: Exception
) -> None:
    breaking.errors.append(error)
    with pytest.raises(Unavailable, match="is lost"):
        await breaking.generate()
    async with asyncio.timeout(10):
        with pytest.raises(DeviceLost, match=re.escape(str(error))):
            await breaking.served
