"""A model of each mechanism on two nodes, over each connector: tokens are those of `transformers`.

Prompts are longer than windows, chunks and steps. Prefixes are found again, and sequences are preempted.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from flowkv_common.bus.connection import connect
from flowkv_common.cluster_view import until_complete, viewing
from flowkv_common.wire.messages import SamplingParams
from tests.drive import load_tiny
from tests.e2e.test_small_pool import count_preemptions
from tests.every_model import tiny_config
from tests.live_nodes import check, client, live_node
from tests.nats_server import NatsServer
from tests.oracle import check_identity
from tests.tiny_models import VOCAB_SIZE, save_random

NUM_BLOCKS = 36  # of 8 tokens: room for three prompts, not for their answers
NUM_OUTPUTS = 40
GREEDY = SamplingParams(max_tokens=NUM_OUTPUTS, temperature=0.0, ignore_eos=True)
MECHANISMS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 24},
    "gemma3_text": {},  # windows of some layers
    "gemma2": {},  # and soft caps
    "gpt_oss": {},  # and sinks, and experts
    "llama4_text": {},  # chunks of some layers
    "qwen3_moe": {},
    "gemma4_text": {"num_kv_shared_layers": 2},  # KV that differs between layers
    "deepseek_v3": {},  # latents
}
OFTEN = ("gpt_oss", "tcp")
CASES = [
    pytest.param(*case, marks=[pytest.mark.full] * (case != OFTEN))
    for case in itertools.product(MECHANISMS, ("shm", "tcp"))
]


@pytest.mark.parametrize(("model_type", "connector"), CASES)
async def test_answers_of_a_pair_of_nodes(
    nats_server: NatsServer, tmp_path: Path, model_type: str, connector: str
) -> None:
    save_random(tiny_config(model_type, **MECHANISMS[model_type]), tmp_path / "m")
    model = load_tiny(tmp_path / "m")
    rng = random.Random(3)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (70, 101, 66, 90, 83)]
    settings: dict[str, Any] = {"num_blocks": NUM_BLOCKS, "connectors": connector}
    async with (
        connect(nats_server.url, name="test") as bus,
        live_node(nats_server, bus, model, "p", role="prefill", **settings) as prefill,
        live_node(nats_server, bus, model, "d", role="decode", peers=1, **settings) as decode,
        client(bus, model.card.fingerprint) as mine,
    ):
        asked = [prompts[0], [*prompts[0], *prompts[1][:5]]]
        alone = [await mine.answer(prefill, decode, prompt_ids, GREEDY) for prompt_ids in asked]
        assert alone[1].num_cached_tokens == 64  # eight full blocks of the first prompt
        together = await asyncio.gather(*(mine.answer(prefill, decode, each, GREEDY) for each in prompts))
        async with viewing(bus) as view:
            await until_complete(view)
            [descriptor] = [node.descriptor for node in view.nodes() if node.node_id == "d"]
        assert await count_preemptions(descriptor) > 0
        assert [(await check(bus, node)).blocks.leased for node in ("p", "d")] == [0, 0]
    for prompt_ids, output in zip([*asked, *prompts], [*alone, *together], strict=True):
        output_ids = [output.token_ids[index] for index in range(NUM_OUTPUTS)]
        check_identity(tmp_path / "m", prompt_ids, output_ids)
