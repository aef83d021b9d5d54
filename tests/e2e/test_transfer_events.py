"""What a node tells of a transfer, in its event and its metrics, is what was sent and how long it took."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flowkv.local_cluster import Cluster
from tests.e2e.conftest import StartCluster
from tests.e2e.load import Streamed, stream_completion
from tests.e2e.observer import Observer, observe
from tests.e2e.test_identity import tiny_with_tokenizer
from tests.oracle import check_identity
from tests.tiny_models import VOCAB_SIZE

BLOCK_SIZE = 8
CHUNK = 64
# K and V of a block of the tiny model: 3 layers, 2 heads of 16, float32.
BLOCK_BYTES = 3 * 2 * BLOCK_SIZE * 2 * 16 * 4
NUM_BLOCKS = 1024
TOKENS = 4
# One chunk, its border, and several chunks whose last block is full or is not.
LENGTHS = (5, 63, 64, 192, 201)
ROUNDED_S = 2e-6


@dataclass(frozen=True)
class Told:
    """A request with what was published about it, and its time as the client saw it."""

    stream: Streamed
    transferred: dict[str, Any]
    finished: dict[str, Any]
    wall_s: float


async def ask_all(http: httpx.AsyncClient, observer: Observer, prompts: list[list[int]]) -> list[Told]:
    """One request after the other, each with the events of its end."""
    transfers = await observer.events("flowkv.v1.event.kv_transferred.>")
    finishes = await observer.events("flowkv.v1.event.request_finished.>")
    told: list[Told] = []
    for number, prompt in enumerate(prompts, start=1):
        began = time.monotonic()
        stream = await stream_completion(http, prompt, max_tokens=TOKENS)
        wall_s = time.monotonic() - began
        transferred = (await transfers.wait_for_all(number))[-1]
        told.append(Told(stream, transferred, (await finishes.wait_for_all(number))[-1], wall_s))
    return told


@pytest.mark.parametrize("overlap", ["true", pytest.param("false", marks=pytest.mark.full)])
async def test_events_and_metrics_agree_with_the_request(
    start_cluster: StartCluster, tmp_path: Path, model_path: Path, overlap: str
) -> None:
    model = tiny_with_tokenizer(tmp_path, "llama", model_path)
    settings = {
        "FLOWKV_BLOCK_SIZE": str(BLOCK_SIZE),
        "FLOWKV_TOKEN_BUDGET": str(CHUNK),
        "FLOWKV_KV_CACHE_BYTES": str(NUM_BLOCKS * BLOCK_BYTES),
        "FLOWKV_OVERLAP_TRANSFER": overlap,
        "FLOWKV_ITL_GOAL_S": "0.000001",  # no chunk keeps it: no prompt stays on the decode node
        "FLOWKV_LENDING": "false",
    }
    cluster: Cluster = start_cluster(model=model, settings=settings, prefill=1, decode=1)
    rng = random.Random(3)
    prompts = [[rng.randrange(20, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
    try:
        async with (
            httpx.AsyncClient(base_url=cluster.url, timeout=60) as http,
            observe(cluster.nats_url) as observer,
        ):
            told = await ask_all(http, observer, prompts)
            await observer.wait_idle(["prefill-0", "decode-0"])
            metrics = await scrape(observer, "prefill-0")
    finally:
        cluster.stop()
    for each in told:
        check_identity(model, each.stream.prompt_ids, each.stream.token_ids)
        check_counts(each, overlaps=overlap == "true")
        check_times(each, overlaps=overlap == "true")
    check_metrics(metrics, [each.transferred for each in told])


def check_counts(told: Told, *, overlaps: bool) -> None:
    """Every block once; in a fresh pool one copy per send, and one send per chunk at most."""
    event, num_tokens = told.transferred, len(told.stream.prompt_ids)
    num_chunks = -(-num_tokens // CHUNK)
    assert event["num_bytes"] == -(-num_tokens // BLOCK_SIZE) * BLOCK_BYTES
    assert event["num_calls"] == event["num_copies"]
    if overlaps and num_chunks > 1:
        assert 2 <= event["num_copies"] <= num_chunks
    else:
        assert event["num_copies"] == 1


def check_times(told: Told, *, overlaps: bool) -> None:
    event = told.transferred
    hidden_s = event.get("hidden_s", 0.0)
    assert event["total_s"] == pytest.approx(hidden_s + event["exposed_s"], abs=ROUNDED_S)
    assert 0 < event["total_s"] <= told.wall_s
    assert event["exposed_s"] > 0
    assert hidden_s <= told.finished["phases_s"]["prefill"] + ROUNDED_S
    has_something_to_hide_behind = overlaps and len(told.stream.prompt_ids) > CHUNK
    assert (hidden_s > 0) == has_something_to_hide_behind


async def scrape(observer: Observer, node_id: str) -> dict[str, float]:
    """All samples of a node that carry the label of a connector, by name."""
    (url,) = [each.metrics_url for each in await observer.descriptors() if each.node.node_id == node_id]
    async with httpx.AsyncClient() as http:
        text = (await http.get(url)).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: sample.value for sample in samples if sample.labels.get("connector") == "shm"}


def check_metrics(metrics: dict[str, float], events: list[dict[str, Any]]) -> None:
    for name in ("bytes", "copies", "calls"):
        assert metrics[f"flowkv_kv_transfer_{name}_total"] == sum(event[f"num_{name}"] for event in events)
    for metric, field in [("", "total_s"), ("hidden_", "hidden_s"), ("exposed_", "exposed_s")]:
        assert metrics[f"flowkv_kv_transfer_{metric}seconds_count"] == len(events)
        total = sum(event.get(field, 0.0) for event in events)
        assert metrics[f"flowkv_kv_transfer_{metric}seconds_sum"] == pytest.approx(total)
