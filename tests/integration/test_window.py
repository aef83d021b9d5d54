"""A server that takes small messages: what nodes announce fits, to its last token and through a retry."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import pytest

from flowkv_common.aio import running
from flowkv_common.bus.connection import connect
from flowkv_common.config import NodeSettings, SchedulerSettings
from flowkv_common.errors import Unavailable
from flowkv_common.wire import subjects
from flowkv_common.wire.limits import payload_for, window_that_fits
from flowkv_common.wire.messages import ModelFiles, SamplingParams, TokenChunk
from flowkv_common.wire.nodes import LoadReport, StepFit
from flowkv_gateway.cluster import ModelNodes, OwnModel
from flowkv_gateway.dispatch import Dispatch, open_dispatch
from flowkv_gateway.request_state import RequestState
from flowkv_scheduler.app import serve as serve_scheduler
from tests.live_nodes import TIMEOUT_S
from tests.nats_server import NatsServer
from tests.paced.digest import paced_tokens
from tests.paced.engine import Pace
from tests.paced.nodes import MAX_MODEL_LEN, PacedNode, paced_layout

BLOCK_SIZE = 16
MAX_PAYLOAD = 56 * 1024
WINDOW = window_that_fits(MAX_PAYLOAD, BLOCK_SIZE)
NUM_TOKENS = 40
PACE = Pace(
    StepFit(base_s=0.004, prefill_token_s=0.0, attended_token_s=0.0, sequence_s=0.0, context_token_s=0.0),
    words=range(100, 400),
    vocab_size=50_000,
    eos_token_id=0,
)
PROMPT = [400 + i * 7919 % 49_000 for i in range(WINDOW - NUM_TOKENS)]
# As many and as long as a gateway takes.
BIAS = {40_000 + i: -1.2345678901234567e-10 for i in range(1024)}


class Small(NamedTuple):
    """One prefill and two decode nodes, a scheduler and a gateway, on a server that takes small messages."""

    dispatch: Dispatch
    nodes: dict[str, PacedNode]
    kill: Callable[[str], object]

    def num_steps(self) -> dict[str, int]:
        return {name: node.engine.kept.num_steps for name, node in self.nodes.items() if node.engine}

    async def answer(self, prompt_ids: list[int], max_tokens: int) -> AsyncIterator[TokenChunk]:
        card = self.dispatch.card_of(self.dispatch.cluster.models[0])
        assert card is not None
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logit_bias=BIAS, num_logprobs=1
        )
        wanted = RequestState("r", prompt_ids, sampling, TIMEOUT_S, fingerprint=card.fingerprint)
        async for piece in self.dispatch.generate(wanted):
            yield piece


def settings(server: NatsServer) -> NodeSettings:
    num_bytes = 3 * WINDOW * paced_layout(BLOCK_SIZE).block_bytes // BLOCK_SIZE
    return NodeSettings(
        nats_url=server.url,
        model_path="",
        kv_cache_bytes=num_bytes,
        block_size=BLOCK_SIZE,
        load_period_s=0.05,
        drain_timeout_s=1.0,
    )


@contextlib.asynccontextmanager
async def small() -> AsyncIterator[Small]:
    with NatsServer(max_payload=MAX_PAYLOAD) as server:
        nodes = {
            f"{role}-{i}": PacedNode(f"{role}-{i}", role)
            for role, i in (("prefill", 0), ("decode", 0), ("decode", 1))
        }
        async with asyncio.TaskGroup() as tasks, connect(server.url, name="test") as bus:
            scheduler = SchedulerSettings(nats_url=server.url, max_wait_s=3600.0, lending=False)
            linked: set[str] = set()
            heard = asyncio.Event()

            def hear(report: LoadReport) -> None:
                if report.ready and report.num_links == len(nodes) - 1:
                    linked.add(report.node.node_id)
                heard.set()

            async with (
                await bus.subscribe(subjects.LOAD_ALL, LoadReport, hear),
                running(serve_scheduler(scheduler, asyncio.Event())),
                open_dispatch(server.url, [ModelNodes(OwnModel(ModelFiles()))]) as dispatch,
            ):
                running_nodes = {
                    name: tasks.create_task(node.run(settings(server), PACE)) for name, node in nodes.items()
                }
                async with asyncio.timeout(TIMEOUT_S):
                    while len(linked) < len(nodes) or dispatch.readiness.why_not_ready():
                        heard.clear()
                        await heard.wait()
                yield Small(dispatch, nodes, lambda name: running_nodes[name].cancel())
                for node in nodes.values():
                    node.stop.set()


async def test_the_announced_window_works_to_its_last_token_also_when_another_node_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with small() as cluster:
        card = cluster.dispatch.card_of(cluster.dispatch.cluster.models[0])
        assert card is not None
        assert (card.max_model_len, WINDOW) == (WINDOW, 1536)
        wanted = payload_for(MAX_MODEL_LEN, BLOCK_SIZE)
        cuts = [message for message in caplog.messages if "max_payload" in message]
        assert cuts == 3 * [
            f"the window is cut from {MAX_MODEL_LEN} to {WINDOW} tokens, what NATS can carry: "
            f"set max_payload in the configuration of the NATS server, now {MAX_PAYLOAD}, to {wanted}"
        ]
        expected = paced_tokens(PROMPT, NUM_TOKENS, PACE.words)

        pieces = [piece async for piece in cluster.answer(PROMPT, NUM_TOKENS)]
        assert [token_id for piece in pieces for token_id in piece.token_ids] == expected
        assert pieces[-1].finish_reason == "length"

        num_steps_before = cluster.num_steps()
        got: list[int] = []
        async for piece in cluster.answer(PROMPT, NUM_TOKENS):
            got += piece.token_ids
            if len(got) == NUM_TOKENS - 5:
                num_steps = cluster.num_steps()
                cluster.kill(max(num_steps, key=lambda name: num_steps[name] - num_steps_before[name]))
        assert got == expected


async def test_a_server_that_can_carry_nothing_ends_the_node_with_the_reason() -> None:
    with NatsServer(max_payload=8192) as server:
        with pytest.raises(Unavailable, match="set max_payload in the configuration.*, now 8192, to 223"):
            await PacedNode("n", "mixed").run(settings(server), PACE)
