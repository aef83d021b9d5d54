"""More work than blocks: sequences are preempted and computed again, requests wait, the text stays right."""

from __future__ import annotations

import random
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flowkv_common.wire.nodes import NodeDescriptor
from tests.e2e.conftest import StartCluster
from tests.e2e.load import run_all
from tests.e2e.observer import observe
from tests.e2e.test_identity import tiny_with_tokenizer
from tests.oracle import check_identity

NUM_REQUESTS = 10
TOKENS = 60
# 24 blocks of 8 tokens of the tiny model: two or three sequences of up to 100 tokens.
NUM_BLOCKS = 24
BLOCK_BYTES = 3 * 2 * 8 * 2 * 16 * 4


@pytest.mark.parametrize(
    "nodes",
    [pytest.param({"mixed": 1}, marks=pytest.mark.full), {"prefill": 1, "decode": 1}],
    ids=["mixed", "1p1d"],
)
async def test_preemption_keeps_the_text(
    start_cluster: StartCluster, tmp_path: Path, model_path: Path, nodes: dict[str, int]
) -> None:
    model = tiny_with_tokenizer(tmp_path, "llama", model_path)
    settings = {
        "FLOWKV_BLOCK_SIZE": "8",
        "FLOWKV_TOKEN_BUDGET": "64",
        "FLOWKV_KV_CACHE_BYTES": str(NUM_BLOCKS * BLOCK_BYTES),
    }
    cluster = start_cluster(model=model, settings=settings, **nodes)
    rng = random.Random(11)
    prompts = [[rng.randrange(20, 500) for _ in range(rng.randrange(5, 40))] for _ in range(NUM_REQUESTS)]
    try:
        async with (
            httpx.AsyncClient(base_url=cluster.url, timeout=120) as http,
            observe(cluster.nats_url) as observer,
        ):
            # Outputs that end soon: as short as these the scheduler expects the next ones.
            ends = {"logit_bias": {"7": 100}, "stop_token_ids": [7], "min_tokens": 3}
            short = await run_all(http, 6 * prompts, TOKENS, **ends)
            assert {stream.finish_reason for stream in short} == {"stop"}
            streams = await run_all(http, prompts, TOKENS)
            descriptors = await observer.descriptors()
            assert {node.num_blocks for node in descriptors} == {NUM_BLOCKS}
            await observer.wait_idle(node.node.node_id for node in descriptors)
            preemptions = [await count_preemptions(node) for node in descriptors if node.role != "prefill"]
    finally:
        cluster.stop()
    for stream in streams:
        assert stream.error is None, stream.error
        assert len(stream.token_ids) == TOKENS
        check_identity(model, stream.prompt_ids, stream.token_ids)
    assert sum(preemptions) > 0


async def count_preemptions(node: NodeDescriptor) -> float:
    async with httpx.AsyncClient() as http:
        text = (await http.get(node.metrics_url)).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "vllm:num_preemptions_total"
    )
