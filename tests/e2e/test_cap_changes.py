"""Nodes change sides all the time while requests run, and no request notices."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from pathlib import Path

import httpx
import pytest

from flowkv_common.aio import running
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Accepted, NodeRef
from flowkv_common.wire.nodes import LoadReport, SetPrefillCap
from tests.e2e.conftest import StartCluster
from tests.e2e.load import Streamed, stream_completion
from tests.e2e.observer import Observer, observe
from tests.e2e.prompts import make_prompts
from tests.oracle import check_identity

AT_ONCE = 6
TOKENS = 12
BLOCK_SIZE = 16
TOKEN_BUDGET = 128
NODES = ("prefill-0", "decode-0")
CAPS = (BLOCK_SIZE, TOKEN_BUDGET, BLOCK_SIZE + 1, 40, TOKEN_BUDGET // 2, TOKEN_BUDGET - 1)


class Mover:
    """Moves the caps of all nodes, once for each `due`."""

    def __init__(self, observer: Observer, nodes: list[NodeRef], rng: random.Random) -> None:
        self.due = asyncio.Semaphore(0)
        self.num_changes = Counter({node.node_id: 0 for node in nodes})
        self._bus = observer.bus
        self._nodes = nodes
        self._rng = rng
        self._epoch = 1

    def hear(self, report: LoadReport) -> None:
        """Nodes obey the leader that they know, and nobody before it."""
        self._epoch = max(self._epoch, report.epoch)

    async def run(self) -> None:
        async with await self._bus.subscribe(subjects.LOAD_ALL, LoadReport, self.hear):
            while True:
                await self.due.acquire()
                for node in self._nodes:
                    await self._move(node)

    async def _move(self, node: NodeRef) -> None:
        message = SetPrefillCap(
            node=node,
            epoch=self._epoch,
            max_prefill_tokens_per_step=self._rng.choice(CAPS),
            reason="a test that knows no mercy",
        )
        await self._bus.request(subjects.at(subjects.NODE_CAP, node.node_id), message, Accepted, timeout_s=5)
        self.num_changes[node.node_id] += 1


@pytest.mark.parametrize(
    ("num_requests", "min_changes"), [(12, 100), pytest.param(24, 200, marks=pytest.mark.full)]
)
async def test_no_request_notices(
    start_cluster: StartCluster, model_path: Path, num_requests: int, min_changes: int
) -> None:
    rng = random.Random(4)
    prompts = rng.sample(make_prompts(vocab_size=49_152, longest=200), num_requests)
    cluster = start_cluster(prefill=1, decode=1, settings={"FLOWKV_TOKEN_BUDGET": str(TOKEN_BUDGET)})
    async with (
        httpx.AsyncClient(base_url=cluster.url, timeout=120) as http,
        observe(cluster.nats_url) as observer,
    ):
        nodes = [record.node for record in await observer.descriptors()]
        events = await observer.events("flowkv.v1.event.request_finished.>")
        mover = Mover(observer, nodes, rng)
        async with running(mover.run()):
            done = await generate(http, prompts, mover, min_changes)
        await observer.wait_idle(NODES)
        finished = await events.wait_for_all(len(done))
    cluster.stop()
    assert mover.num_changes.keys() == set(NODES)
    assert len(done) >= num_requests
    # Requests have really met nodes of either kind on either side.
    assert len({(event["prefill_node"], event["decode_node"]) for event in finished}) > 1
    for stream in done:
        assert stream.error is None, stream.error
        assert (len(stream.token_ids), stream.finish_reason) == (TOKENS, "length")
        check_identity(model_path, stream.prompt_ids, stream.token_ids)


async def generate(
    http: httpx.AsyncClient, prompts: list[list[int]], mover: Mover, min_changes: int
) -> list[Streamed]:
    """Greedy output of all prompts, some at once; each token that comes makes changes due.

    A node answers between two steps, so a slow host gets fewer changes into a request: the prompts
    go round until each node has changed `min_changes` times.
    """
    left = itertools.count(len(prompts), -1)
    waiting = itertools.cycle(prompts)
    done: list[Streamed] = []

    async def ask() -> None:
        while next(left) > 0 or min(mover.num_changes.values()) < min_changes:
            done.append(
                await stream_completion(
                    http, next(waiting), max_tokens=TOKENS, on_chunk=lambda _: mover.due.release()
                )
            )

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(ask())
    return done
