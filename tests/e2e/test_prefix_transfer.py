"""A decode node that has a prefix is sent only what is new, and answers as if it had been sent all."""

from __future__ import annotations

import random
from pathlib import Path

import httpx

from flowkv.local_cluster import Cluster
from flowkv_common.wire.messages import PoolLayout
from tests.e2e.conftest import StartCluster
from tests.e2e.load import stream_completion
from tests.e2e.observer import observe
from tests.oracle import check_identity

TOKENS = 8
PREFIX_TOKENS = 800  # 50 whole blocks
NEW_TOKENS = 77
VOCAB_SIZE = 49_152


async def test_only_new_blocks_of_a_known_prefix_are_sent(
    start_cluster: StartCluster, model_path: Path
) -> None:
    # No chunk keeps such a goal: no prompt stays on the decode node. Nor is that lent.
    settings = {"FLOWKV_ITL_GOAL_S": "0.000001", "FLOWKV_LENDING": "false"}
    cluster: Cluster = start_cluster(prefill=1, decode=1, settings=settings)
    rng = random.Random("a prefix that no other test sends")
    prefix, first_end, second_end = (
        [rng.randrange(20, VOCAB_SIZE) for _ in range(length)]
        for length in (PREFIX_TOKENS, NEW_TOKENS, NEW_TOKENS)
    )
    async with (
        httpx.AsyncClient(base_url=cluster.url, timeout=120) as http,
        observe(cluster.nats_url) as observer,
    ):
        events = await observer.events("flowkv.v1.event.kv_transferred.>")
        first = await stream_completion(http, prefix + first_end, max_tokens=TOKENS)
        await observer.wait_idle(["prefill-0", "decode-0"])
        second = await stream_completion(http, prefix + second_end, max_tokens=TOKENS)
        sent_first, sent_second = await events.wait_for_all(2)
        await observer.wait_idle(["prefill-0", "decode-0"])
        (layout,) = {node.layout for node in await observer.descriptors()}
    for stream in (first, second):
        assert stream.error is None, stream.error
        check_identity(model_path, stream.prompt_ids, stream.token_ids)
    num_blocks = num_blocks_of(PREFIX_TOKENS + NEW_TOKENS, layout)
    assert sent_first["num_bytes"] == num_blocks * layout.block_bytes
    num_new_blocks = num_blocks - PREFIX_TOKENS // layout.block_size
    assert num_new_blocks == 5
    assert sent_second["num_bytes"] == num_new_blocks * layout.block_bytes
    assert sent_second["decode_node"] == sent_first["decode_node"] == "decode-0"


def num_blocks_of(num_tokens: int, layout: PoolLayout) -> int:
    return -(-num_tokens // layout.block_size)
