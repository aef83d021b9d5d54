"""What a request waits behind the backlog of another tenant: turns beside a played prefill node."""

from __future__ import annotations

import asyncio
import statistics

import msgspec
import pytest

from flowkv_common.wire.messages import ModelFiles
from flowkv_common.wire.nodes import StepFit
from flowkv_gateway.cluster import ModelNodes, OwnModel
from flowkv_gateway.tenants import Tenant, Tenants
from flowkv_gateway.turns import Turns
from tests.described_nodes import TOKEN_BUDGET, descriptor, report

NUM_TOKENS = 40
CPU = StepFit(12e-3, 0.75e-3, 0.0, 0.0, 0.0)
GPU = StepFit(8e-3, 32e-6, 0.0, 0.0, 0.0)


def step_s(costs: StepFit, num_tokens: int) -> float:
    return costs.base_s + costs.prefill_token_s * num_tokens


class PlayedNode:
    """A step takes all prompts that are there, up to its token budget. Time is played, so it is exact."""

    def __init__(self, costs: StepFit) -> None:
        self.costs = costs
        self.now = 0.0
        cluster = ModelNodes(OwnModel(ModelFiles()), clock=lambda: 0.0)
        nodes = {"p": descriptor("p", "prefill"), "d": descriptor("d", "decode")}
        cluster.on_nodes(nodes)
        for node_id, node in nodes.items():
            cluster.on_report(report(node_id, node.role, step=costs))
        self.turns = Turns(cluster.num_nodes, cluster.num_prefill_nodes, cluster.prompt_tokens_at_once)
        self.queue: list[asyncio.Event] = []
        self.batch: list[asyncio.Event] = []  # of the step that runs
        self.ends = 0.0  # that step
        self.num_computed = 0

    async def ask(self, tenant: Tenant) -> float:
        """Returns the seconds to the first token."""
        began = self.now
        with tenant.open_request(NUM_TOKENS), self.turns.turn(tenant, NUM_TOKENS) as turn:
            await self.turns.wait(turn)
            self.turns.assign(turn)
            computed = asyncio.Event()
            self.queue.append(computed)
            await computed.wait()
            self.turns.end(turn)
        return self.now - began

    async def step(self) -> None:
        """Ends the step that runs. The next one has no time to wait for what its first tokens bring."""
        if self.batch:
            self.now = self.ends
            self.num_computed += len(self.batch)
        computed, self.batch = self.batch, []
        self._begin_step()
        for one in computed:
            one.set()
        await settle()
        if not self.batch:
            self._begin_step()

    def _begin_step(self) -> None:
        most = TOKEN_BUDGET // NUM_TOKENS
        self.batch, self.queue = self.queue[:most], self.queue[most:]
        self.ends = self.now + step_s(self.costs, len(self.batch) * NUM_TOKENS)


async def settle() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


# Without the way to the node, which takes as long in both cases.
@pytest.mark.parametrize(("costs", "most"), [(CPU, 2.0), (GPU, 2.25)], ids=["cpu", "gpu"])
async def test_a_lone_request_beside_three_hundred_has_its_token_in_twice_the_time(
    costs: StepFit, most: float
) -> None:
    node, tenants = PlayedNode(costs), Tenants(0, 0, clock=lambda: 0.0)
    busy, other = tenants.find("busy"), tenants.find("other")
    with other.open_request(1):
        pass  # it was here, and will come again
    backlog = [asyncio.create_task(node.ask(busy)) for _ in range(300)]
    waits: list[float] = []
    for place in range(13):
        await node.step()
        assert node.batch, "the node is never without work"
        node.now += (place * 0.618 % 1.0) * (node.ends - node.now)  # it comes at any time within a step
        asked = asyncio.create_task(node.ask(other))
        await settle()
        while not asked.done():
            await node.step()
        waits.append(asked.result())
    assert statistics.median(waits) <= most * step_s(costs, NUM_TOKENS)
    whole_steps = node.now * TOKEN_BUDGET / step_s(costs, TOKEN_BUDGET)
    assert node.num_computed * NUM_TOKENS > 0.5 * whole_steps, "short steps compute less, within bounds"
    for task in backlog:
        task.cancel()
    await asyncio.wait(backlog)


async def test_steps_are_whole_where_no_tenant_is_expected() -> None:
    """All wait already; and those that have asked once have left."""
    now = 0.0
    node, tenants = PlayedNode(CPU), Tenants(0, 0, clock=lambda: now)
    with tenants.find("left").open_request(1):
        pass
    now = 11.0
    askers = [asyncio.create_task(node.ask(tenants.find(name))) for name in "ab" for _ in range(30)]
    await settle()
    for _ in range(3):
        await node.step()
        assert len(node.batch) + len(node.queue) >= TOKEN_BUDGET // NUM_TOKENS
    for task in askers:
        task.cancel()
    await asyncio.wait(askers)


def test_prompts_at_once_are_those_that_make_a_step_twice_as_long() -> None:
    cluster = ModelNodes(OwnModel(ModelFiles()), clock=lambda: 0.0)
    nodes = [("p0", "prefill"), ("p1", "prefill"), ("m", "mixed"), ("d", "decode")]
    cluster.on_nodes({node_id: descriptor(node_id, role) for node_id, role in nodes})
    assert (cluster.num_prefill_nodes(), cluster.prompt_tokens_at_once(True)) == (0, 0)
    for node_id, role in nodes:
        cluster.on_report(report(node_id, role, step=CPU))
    assert (cluster.num_prefill_nodes(), cluster.prompt_tokens_at_once(True)) == (3, 3 * 16)
    assert cluster.prompt_tokens_at_once(False) == 128 + 2 * TOKEN_BUDGET
    # Its costs are not known: a whole step.
    cluster.on_report(report("m", "mixed"))
    cluster.on_report(report("p1", "prefill", step=msgspec.structs.replace(CPU, prefill_token_s=0.0)))
    assert cluster.prompt_tokens_at_once(True) == 16 + 128 + TOKEN_BUDGET
    cluster.on_report(report("p0", "prefill", ready=False))
    assert (cluster.num_prefill_nodes(), cluster.prompt_tokens_at_once(True)) == (2, 128 + TOKEN_BUDGET)
