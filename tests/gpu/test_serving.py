"""One prefill and one decode node on one GPU, as real processes: the cache moves by CUDA IPC."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch

from flowkv.local_cluster import Cluster
from tests.e2e.load import run_all
from tests.e2e.observer import observe
from tests.gateway_support import write_tokenizer
from tests.oracle import check_identity
from tests.tiny_models import VOCAB_SIZE, make_tiny_model

pytestmark = pytest.mark.gpu
TOKENS = 12
READY_TIMEOUT_S = 240.0  # kernels are compiled
SETTINGS = {
    "FLOWKV_DEVICE": "cuda:0",
    "FLOWKV_DTYPE": "float32",  # what the oracle's tolerance is for
    "FLOWKV_KV_CACHE_BYTES": str(64 << 20),
    "FLOWKV_MAX_NUM_SEQS": "8",
    "FLOWKV_TOKEN_BUDGET": "128",
    # No chunk keeps such a goal, so no prompt stays on the decode node.
    "FLOWKV_ITL_GOAL_S": "0.000001",
    "FLOWKV_TTFT_GOAL_S": "3600",
    "FLOWKV_LENDING": "false",
    "FLOWKV_MAX_WAIT_S": "3600",
}


@pytest.mark.parametrize("overlap", ["true", "false"])
async def test_tokens_are_those_of_transformers(tmp_path: Path, overlap: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = make_tiny_model(tmp_path / "m", seed=5, max_position_embeddings=2048)
    write_tokenizer(model)
    prompts = [
        [(3 + number * 31 + place * 7) % VOCAB_SIZE for place in range(length)]
        for number, length in enumerate([1, 15, 16, 17, 127, 128, 129, 300, 700])
    ]
    with Cluster(
        tmp_path / "run",
        str(model),
        nodes={"prefill": 1, "decode": 1},
        model_name="tiny",
        settings={**SETTINGS, "FLOWKV_OVERLAP_TRANSFER": overlap},
    ) as cluster:
        cluster.wait_ready(READY_TIMEOUT_S)
        async with (
            observe(cluster.nats_url) as observer,
            httpx.AsyncClient(base_url=cluster.url, timeout=120) as http,
        ):
            events = await observer.events("flowkv.v1.event.kv_transferred.>")
            done = await run_all(http, prompts, TOKENS)
            await observer.wait_idle(["prefill-0", "decode-0"])
    for stream in done:
        assert stream.error is None, stream.error
        assert (len(stream.token_ids), stream.finish_reason) == (TOKENS, "length")
        check_identity(model, stream.prompt_ids, stream.token_ids)
    assert len(events.events) == len(prompts)
    assert {event["connector"] for _, event in events.events} == {"cuda_ipc"}
