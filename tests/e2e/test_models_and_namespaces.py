"""Several models behind one gateway, and two clusters at one NATS: real processes, every answer checked."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import httpx
import pytest

from flowkv.local_cluster import Cluster, free_port
from tests.e2e.conftest import StartCluster
from tests.e2e.load import Streamed, run_all, stream_completion, wait_healthy
from tests.e2e.observer import observe
from tests.e2e.prompts import make_prompts
from tests.e2e.test_identity import AT_ONCE, TOKENS, check_all, tiny_with_tokenizer
from tests.tiny_models import VOCAB_SIZE

TINY = "tiny"
NUM_WORKERS = 4


async def answers_of(url: str, model: str, prompts: list[list[int]]) -> list[Streamed]:
    done: list[Streamed] = []
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        for start in range(0, len(prompts), AT_ONCE):
            done += await run_all(http, prompts[start : start + AT_ONCE], TOKENS, model=model)
    return done


async def listed(url: str) -> list[str]:
    async with httpx.AsyncClient(base_url=url, timeout=10) as http:
        return [entry["id"] for entry in (await http.get("/v1/models")).json()["data"]]


@pytest.mark.full
async def test_two_models_and_two_namespaces_at_one_nats(
    start_cluster: StartCluster, tmp_path: Path, model_path: Path
) -> None:
    """`flowkv up` with two models; and beside it, at its NATS, a cluster of another namespace."""
    tiny = tiny_with_tokenizer(tmp_path / "model", "llama", model_path)
    cluster = start_cluster(prefill=1, decode=1, other_models={TINY: str(tiny)})
    other_url = start_namespace(cluster, "team-b", tiny)
    try:
        async with httpx.AsyncClient(base_url=other_url, timeout=60) as http:
            await wait_healthy(http, 120)
        assert (await listed(cluster.url), await listed(other_url)) == (["test-model", TINY], [TINY])
        large = make_prompts(vocab_size=49_152, longest=300)
        small = make_prompts(vocab_size=VOCAB_SIZE, longest=220)
        done = await asyncio.gather(
            answers_of(cluster.url, "test-model", large),
            answers_of(cluster.url, TINY, small),
            answers_of(other_url, TINY, small),
        )
        for model, streams in zip((model_path, tiny, tiny), done, strict=True):
            check_all(model, streams)
        async with httpx.AsyncClient(base_url=cluster.url, timeout=10) as http:
            unnamed = await stream_completion(http, [100], max_tokens=1)
            unknown = await stream_completion(http, [100], max_tokens=1, model="gpt-4")
        assert unnamed.error is not None
        assert unknown.error is not None
        assert (unnamed.error["param"], unknown.error["code"]) == ("model", "model_not_found")
        async with observe(cluster.nats_url) as observer:
            names = {node.node.node_id for node in await observer.descriptors()}
        assert names == {"prefill-0", "prefill-1", "decode-0", "decode-1"}
    finally:
        cluster.stop()


def start_namespace(cluster: Cluster, namespace: str, model: Path) -> str:
    """A scheduler, a pair and a gateway. Returns the gateway's URL."""
    port = free_port()
    scheduler = [sys.executable, "-m", "flowkv", "scheduler", "--namespace", namespace]
    cluster.start_process(f"scheduler-{namespace}", scheduler)
    settings = {"namespace": namespace, "model_path": str(model), "model_name": TINY}
    for role in ("prefill", "decode"):
        cluster.start_node(role, f"{role}-{namespace}", **settings)
    cluster.start_gateway(f"gateway-{namespace}", port, **settings)
    return f"http://127.0.0.1:{port}"


@pytest.mark.full
async def test_a_rolling_change_of_model_under_load(
    start_cluster: StartCluster, tmp_path: Path, model_path: Path
) -> None:
    """As docs/operations.md says: the new nodes, then the clients, then the old nodes. Nothing fails."""
    tiny = tiny_with_tokenizer(tmp_path / "model", "qwen3", model_path)
    cluster = start_cluster(prefill=1, decode=1)
    done: dict[str, list[Streamed]] = {"test-model": [], TINY: []}
    asked, is_over = "test-model", asyncio.Event()

    async def keep_asking(number: int) -> None:
        prompts = make_prompts(vocab_size=VOCAB_SIZE, longest=100, seed=number)
        for prompt in iter(prompts * 100):
            if is_over.is_set():
                return
            model = asked
            done[model].append(await stream_completion(http, prompt, max_tokens=TOKENS, model=model))

    async def until_answered(model: str, num: int) -> None:
        async with asyncio.timeout(120):
            while len(done[model]) < num:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    try:
        async with (
            httpx.AsyncClient(base_url=cluster.url, timeout=120) as http,
            observe(cluster.nats_url) as observer,
            asyncio.TaskGroup() as workers,
        ):
            for number in range(NUM_WORKERS):
                workers.create_task(keep_asking(number))
            await until_answered("test-model", 10)
            for role in ("prefill", "decode"):
                cluster.start_node(role, f"{role}-{TINY}", model_path=str(tiny), model_name=TINY)
            await observer.wait_linked(f"decode-{TINY}", 1)
            await observer.wait_linked(f"prefill-{TINY}", 1)
            async with asyncio.timeout(20):
                while TINY not in await listed(cluster.url):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            asked = TINY
            await until_answered(TINY, 10)
            for role in ("prefill", "decode"):
                await asyncio.to_thread(cluster.processes[f"{role}-0"].stop, 30)
            await until_answered(TINY, len(done[TINY]) + 10)
            is_over.set()
        print(f"answers of the old model: {len(done['test-model'])}, of the new one: {len(done[TINY])}")
        check_all(model_path, done["test-model"])
        check_all(tiny, done[TINY])
    finally:
        cluster.stop()
