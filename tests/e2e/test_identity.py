"""Greedy output is what `transformers` alone gives, whatever the nodes (docs/architecture.md, rule 13)."""

from __future__ import annotations

import itertools
from pathlib import Path

import httpx
import pytest

from flowkv.local_cluster import Cluster
from flowkv_engine.engine.fetch import default_cache_dir, resolve_model
from tests.e2e.conftest import StartCluster
from tests.e2e.load import Streamed, run_all
from tests.e2e.observer import observe
from tests.e2e.prompts import make_prompts
from tests.oracle import check_identity
from tests.tiny_models import VOCAB_SIZE, make_tiny_model

TOKENS = 12
AT_ONCE = 8


async def generate_all(url: str, prompts: list[list[int]]) -> list[Streamed]:
    """Greedy output of all prompts, several at once."""
    done: list[Streamed] = []
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        for start in range(0, len(prompts), AT_ONCE):
            done += await run_all(http, prompts[start : start + AT_ONCE], TOKENS)
    return done


def check_all(model: Path, done: list[Streamed]) -> None:
    """Of answers that are the same one is compared with `transformers`."""
    for stream in done:
        assert stream.error is None, stream.error
        assert (len(stream.token_ids), stream.finish_reason) == (TOKENS, "length")
    for stream in {(*stream.prompt_ids, *stream.token_ids): stream for stream in done}.values():
        check_identity(model, stream.prompt_ids, stream.token_ids)


async def test_shared_memory_1p1d(cluster: Cluster, model_path: Path) -> None:
    prompts = make_prompts(vocab_size=49_152, longest=1025)  # the matrix below has the longest
    assert len(prompts) >= 40
    async with observe(cluster.nats_url) as observer:
        events = await observer.events("flowkv.v1.event.kv_transferred.>")
        finishes = await observer.events("flowkv.v1.event.request_finished.>")
        done = await generate_all(cluster.url, prompts)
        await observer.wait_idle(["prefill-0", "decode-0"])
        finished = await finishes.wait_for_all(len(prompts))
    check_all(model_path, done)
    # A short prompt may stay on an idle decode node; all others crossed the wire.
    num_travelled = sum(event["prefill_node"] != event["decode_node"] for event in finished)
    assert {event["connector"] for _, event in events.events} == {"shm"}
    assert len(events.events) == num_travelled
    assert num_travelled >= 20


def clusters() -> list[tuple[str, dict[str, int]]]:
    pairs = itertools.product(("shm", "tcp"), ({"prefill": 1, "decode": 1}, {"prefill": 2, "decode": 2}))
    return [*pairs, ("shm", {"mixed": 1})]


@pytest.mark.full
@pytest.mark.parametrize(("connector", "nodes"), clusters(), ids=str)
async def test_real_model_matrix(
    start_cluster: StartCluster, model_path: Path, connector: str, nodes: dict[str, int]
) -> None:
    cluster = start_cluster(settings={"FLOWKV_CONNECTORS": connector}, **nodes)
    try:
        check_all(model_path, await generate_all(cluster.url, make_prompts(vocab_size=49_152)))
    finally:
        cluster.stop()


@pytest.mark.full
@pytest.mark.parametrize("arch", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize(("connector", "nodes"), clusters(), ids=str)
async def test_tiny_model_matrix(
    start_cluster: StartCluster,
    tmp_path: Path,
    model_path: Path,
    arch: str,
    connector: str,
    nodes: dict[str, int],
) -> None:
    model = tiny_with_tokenizer(tmp_path, arch, model_path)
    # Small chunks and few blocks: borders everywhere, and preemption.
    settings = {"FLOWKV_CONNECTORS": connector, "FLOWKV_TOKEN_BUDGET": "64", "FLOWKV_BLOCK_SIZE": "8"}
    cluster = start_cluster(model=model, settings=settings, **nodes)
    try:
        prompts = make_prompts(vocab_size=VOCAB_SIZE, longest=220)
        check_all(model, await generate_all(cluster.url, prompts))
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Gemma 3 270M: fifteen of its layers see 512 tokens back, three see all."""
    return resolve_model("gemma-3-270m", default_cache_dir())


@pytest.mark.full
@pytest.mark.parametrize("nodes", [{"prefill": 1, "decode": 1}, {"mixed": 1}], ids=str)
async def test_gemma_3_within_and_beyond_its_window(
    start_cluster: StartCluster, gemma_path: Path, nodes: dict[str, int]
) -> None:
    cluster = start_cluster(model=gemma_path, **nodes)
    try:
        prompts = [prompt for prompt in make_prompts(vocab_size=49_152, longest=1025) if len(prompt) > 500]
        assert len(prompts) == 6
        check_all(gemma_path, await generate_all(cluster.url, [*prompts, prompts[-1][:600], prompts[0][:3]]))
    finally:
        cluster.stop()


def tiny_with_tokenizer(folder: Path, arch: str, model_path: Path) -> Path:
    """A tiny random model; prompts are token ids, so any tokenizer serves."""
    model = make_tiny_model(folder, arch)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((model_path / name).read_bytes())
    return model
