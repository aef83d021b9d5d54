"""One number makes a node a prefill or a decode node, and a leading scheduler may move it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from flowkv_common.errors import BadRequest, Stale
from flowkv_common.wire.messages import NodeRef
from flowkv_engine.engine.model import LoadedModel
from tests.live_nodes import BLOCK_SIZE, TOKEN_BUDGET, LiveNode, first, live_node, one_node, reports
from tests.nats_server import NatsServer

FIELD = "max_prefill_tokens_per_step"
NUM_TOKENS = 3 * TOKEN_BUDGET
# Only news make a node report in the time that a test takes.
LOAD_PERIOD_S = 30.0


@pytest.fixture
async def node(nats_server: NatsServer, model: LoadedModel) -> AsyncIterator[LiveNode]:
    async with one_node(nats_server, model, load_period_s=LOAD_PERIOD_S) as node:
        yield node


async def prefill(node: LiveNode, num_tokens: int, *, first_id: int, epoch: int = 1) -> None:
    """A prompt that ends with its first token: only prefill steps. None is cached under another id."""
    await node.generate([first_id] * num_tokens, max_tokens=1, epoch=epoch)


async def metrics(node: LiveNode) -> dict[str, float]:
    families = text_string_to_metric_families((await node.get("/metrics")).text)
    return {sample.name: sample.value for family in families for sample in family.samples}


async def test_the_next_step_obeys_and_everyone_hears(
    node: LiveNode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "flowkv_node.endpoints")
    steps = "vllm:iteration_tokens_total_count"
    for number, cap in enumerate((BLOCK_SIZE, 3 * BLOCK_SIZE, TOKEN_BUDGET)):
        async with reports(node.bus, "n0") as heard:
            await node.set_cap(cap)
            assert (await first(heard, lambda _: True)).max_prefill_tokens_per_step == cap
        before = await metrics(node)
        await prefill(node, NUM_TOKENS, first_id=30 + number)
        after = await metrics(node)
        assert after[steps] - before[steps] == NUM_TOKENS // cap
        assert after["flowkv_max_prefill_tokens_per_step"] == cap
        assert after["flowkv_cap_changes_total"] == number + 1
    assert (await node.descriptor(cap=TOKEN_BUDGET)).node == node.ref
    lines = [record.getMessage() for record in caplog.records if "chunk budget" in record.getMessage()]
    assert len(lines) == 3
    assert all("the test says so" in line for line in lines)


async def test_the_same_cap_again_changes_nothing(node: LiveNode) -> None:
    for _ in range(3):
        await node.set_cap(BLOCK_SIZE)
    assert (await metrics(node))["flowkv_cap_changes_total"] == 1


@pytest.mark.parametrize("cap", [-1, 0, BLOCK_SIZE - 1, TOKEN_BUDGET + 1])
async def test_a_cap_that_no_node_can_have_is_refused(node: LiveNode, cap: int) -> None:
    with pytest.raises(BadRequest) as caught:
        await node.set_cap(cap)
    assert caught.value.field == FIELD
    assert (await metrics(node))["flowkv_cap_changes_total"] == 0


async def test_a_message_to_a_former_incarnation_is_refused(node: LiveNode) -> None:
    with pytest.raises(Stale):
        await node.set_cap(BLOCK_SIZE, node=NodeRef(node_id="n0", incarnation="before"))
    assert (await metrics(node))["flowkv_cap_changes_total"] == 0


async def test_an_older_leader_is_refused(node: LiveNode) -> None:
    await node.set_cap(BLOCK_SIZE, epoch=7)
    await node.set_cap(2 * BLOCK_SIZE, epoch=7)
    with pytest.raises(Stale):
        await node.set_cap(TOKEN_BUDGET, epoch=6)
    assert (await metrics(node))["flowkv_max_prefill_tokens_per_step"] == 2 * BLOCK_SIZE


async def test_an_assignment_tells_of_its_leader_and_is_kept_however_old(node: LiveNode) -> None:
    await prefill(node, 20, first_id=40, epoch=9)
    with pytest.raises(Stale):
        await node.set_cap(BLOCK_SIZE, epoch=8)
    await prefill(node, 20, first_id=41, epoch=1)
    await node.set_cap(BLOCK_SIZE, epoch=9)


async def test_a_handoff_tells_the_decode_node_of_the_leader(
    node: LiveNode, nats_server: NatsServer, model: LoadedModel
) -> None:
    async with (
        live_node(nats_server, node.bus, model, "n1", peers=1) as n1,
        reports(node.bus, "n1") as heard,
    ):
        await node.client.generate(node.ref, n1, [45] * 20, max_tokens=2, epoch=9)
        assert (await first(heard, lambda report: report.epoch > 0)).epoch == 9


async def test_the_load_report_says_what_steps_cost(node: LiveNode) -> None:
    """Three prompts in small chunks, then one sequence: enough steps of both kinds."""
    await node.set_cap(BLOCK_SIZE)
    for first_id in (50, 51, 52):
        await prefill(node, 40, first_id=first_id)
    async with reports(node.bus, "n0") as heard, asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        tasks.create_task(node.generate([60] * 24, max_tokens=60))
        report = await heard.get()
        while not report.num_context_tokens:
            await node.set_cap(BLOCK_SIZE)  # makes it report again
            report = await heard.get()
    assert 24 <= report.num_context_tokens < 24 + 60
    assert report.step is not None
    # Every step has taken some time, whatever of it each token is given.
    assert report.step.base_s + report.step.prefill_token_s > 0.0
