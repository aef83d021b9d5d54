"""One number makes a node a prefill or a decode node, and a leading scheduler may move it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import NamedTuple

import httpx
import pytest
from live_nodes import BLOCK_SIZE, TOKEN_BUDGET, Client, client, first, live_node, reports
from nats_server import NatsServer
from prometheus_client.parser import text_string_to_metric_families

from flowkv_common.aio import running
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.registry import watch_nodes
from flowkv_common.errors import BadRequest, Stale
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Accepted, NodeRef
from flowkv_common.wire.nodes import NodeDescriptor, SetPrefillCap
from flowkv_engine.engine.model import LoadedModel

FIELD = "max_prefill_tokens_per_step"
NUM_TOKENS = 3 * TOKEN_BUDGET
# Only news make a node report in the time that a test takes.
LOAD_PERIOD_S = 30.0


class Setup(NamedTuple):
    bus: Bus
    client: Client
    node: NodeRef

    async def set_cap(self, cap: int, *, epoch: int = 1, node: NodeRef | None = None) -> None:
        message = SetPrefillCap(
            node=node or self.node, epoch=epoch, max_prefill_tokens_per_step=cap, reason="the test says so"
        )
        subject = subjects.at(subjects.NODE_CAP, self.node.node_id)
        answer = await self.bus.request(subject, message, Accepted, timeout_s=5)
        assert answer == Accepted(node_id=self.node.node_id)

    async def prefill(self, num_tokens: int, *, first_id: int, epoch: int = 1) -> None:
        """A prompt that ends with its first token: only prefill steps. None is cached under another id."""
        prompt_ids = [first_id] * num_tokens
        await self.client.generate(self.node, self.node, prompt_ids, max_tokens=1, epoch=epoch)

    async def metrics(self) -> dict[str, float]:
        async with asyncio.timeout(5), httpx.AsyncClient() as http:
            text = (await http.get((await self.descriptor()).metrics_url)).text
        families = text_string_to_metric_families(text)
        return {sample.name: sample.value for family in families for sample in family.samples}

    async def descriptor(self, cap: int | None = None) -> NodeDescriptor:
        """The node's record in the registry, once it says `cap`."""
        found: asyncio.Queue[NodeDescriptor] = asyncio.Queue()

        def look(nodes: dict[str, NodeDescriptor]) -> None:
            record = nodes.get(self.node.node_id)
            if record is not None and cap in (None, record.max_prefill_tokens_per_step):
                found.put_nowait(record)

        async with running(watch_nodes(self.bus, look)), asyncio.timeout(10):
            return await found.get()


@pytest.fixture
async def setup(nats_server: NatsServer, model: LoadedModel) -> AsyncIterator[Setup]:
    async with AsyncExitStack() as opened:
        bus = await opened.enter_async_context(connect(nats_server.url, name="test"))
        node = await opened.enter_async_context(
            live_node(nats_server, bus, model, "n0", load_period_s=LOAD_PERIOD_S)
        )
        yield Setup(bus, await opened.enter_async_context(client(bus, model.card.fingerprint)), node)


async def test_the_next_step_obeys_and_everyone_hears(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "flowkv_node.endpoints")
    steps = "vllm:iteration_tokens_total_count"
    for number, cap in enumerate((BLOCK_SIZE, 3 * BLOCK_SIZE, TOKEN_BUDGET)):
        async with reports(setup.bus, "n0") as heard:
            await setup.set_cap(cap)
            assert (await first(heard, lambda _: True)).max_prefill_tokens_per_step == cap
        before = await setup.metrics()
        await setup.prefill(NUM_TOKENS, first_id=30 + number)
        after = await setup.metrics()
        assert after[steps] - before[steps] == NUM_TOKENS // cap
        assert after["flowkv_max_prefill_tokens_per_step"] == cap
        assert after["flowkv_cap_changes_total"] == number + 1
    assert (await setup.descriptor(cap=TOKEN_BUDGET)).node == setup.node
    lines = [record.getMessage() for record in caplog.records if "chunk budget" in record.getMessage()]
    assert len(lines) == 3
    assert all("the test says so" in line for line in lines)


async def test_the_same_cap_again_changes_nothing(setup: Setup) -> None:
    for _ in range(3):
        await setup.set_cap(BLOCK_SIZE)
    assert (await setup.metrics())["flowkv_cap_changes_total"] == 1


@pytest.mark.parametrize("cap", [-1, 0, BLOCK_SIZE - 1, TOKEN_BUDGET + 1])
async def test_a_cap_that_no_node_can_have_is_refused(setup: Setup, cap: int) -> None:
    with pytest.raises(BadRequest) as caught:
        await setup.set_cap(cap)
    assert caught.value.field == FIELD
    assert (await setup.metrics())["flowkv_cap_changes_total"] == 0


async def test_a_message_to_a_former_incarnation_is_refused(setup: Setup) -> None:
    with pytest.raises(Stale):
        await setup.set_cap(BLOCK_SIZE, node=NodeRef(node_id="n0", incarnation="before"))
    assert (await setup.metrics())["flowkv_cap_changes_total"] == 0


async def test_an_older_leader_is_refused(setup: Setup) -> None:
    await setup.set_cap(BLOCK_SIZE, epoch=7)
    await setup.set_cap(2 * BLOCK_SIZE, epoch=7)
    with pytest.raises(Stale):
        await setup.set_cap(TOKEN_BUDGET, epoch=6)
    assert (await setup.metrics())["flowkv_max_prefill_tokens_per_step"] == 2 * BLOCK_SIZE


async def test_an_assignment_tells_of_its_leader_and_is_kept_however_old(setup: Setup) -> None:
    await setup.prefill(20, first_id=40, epoch=9)
    with pytest.raises(Stale):
        await setup.set_cap(BLOCK_SIZE, epoch=8)
    await setup.prefill(20, first_id=41, epoch=1)
    await setup.set_cap(BLOCK_SIZE, epoch=9)


async def test_a_handoff_tells_the_decode_node_of_the_leader(
    setup: Setup, nats_server: NatsServer, model: LoadedModel
) -> None:
    async with (
        live_node(nats_server, setup.bus, model, "n1", peers=1) as n1,
        reports(setup.bus, "n1") as heard,
    ):
        await setup.client.generate(setup.node, n1, [45] * 20, max_tokens=2, epoch=9)
        assert (await first(heard, lambda report: report.epoch > 0)).epoch == 9


async def test_the_load_report_says_what_steps_cost(setup: Setup) -> None:
    """Three prompts in small chunks, then one sequence: enough steps of both kinds."""
    await setup.set_cap(BLOCK_SIZE)
    for first_id in (50, 51, 52):
        await setup.prefill(40, first_id=first_id)
    async with reports(setup.bus, "n0") as heard, asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        tasks.create_task(setup.client.generate(setup.node, setup.node, [60] * 24, max_tokens=60))
        report = await heard.get()
        while not report.num_context_tokens:
            await setup.set_cap(BLOCK_SIZE)  # makes it report again
            report = await heard.get()
    assert 24 <= report.num_context_tokens < 24 + 60
    assert report.step is not None
    # Every step has taken some time, whatever of it each token is given.
    assert report.step.base_s + report.step.prefill_token_s > 0.0
