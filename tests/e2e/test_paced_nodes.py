"""Clusters of paced nodes: all is real but the engines, so what scheduling does shows on any host."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import pytest

from flowkv.bench.load import Arrival, drive
from flowkv.local_cluster import Cluster
from flowkv_common.wire.nodes import LoadReport, StepFit
from flowkv_node import reporting
from flowkv_node.node import Node
from tests.e2e.load import Streamed, run_all, stream_completion
from tests.e2e.observer import observe
from tests.paced.cluster import READY_TIMEOUT_S, node_settings, services, variables, wait_linked
from tests.paced.digest import paced_tokens
from tests.paced.engine import Kept, Pace
from tests.paced.nodes import PacedNode, pace_of, paced_nodes

NUM_BLOCKS = 2048
CHUNK_TOKENS = 64
DECODE_STEP_S = 0.02
PROMPT_TOKEN_S = 0.001


@dataclass(frozen=True)
class Paced:
    """A cluster whose nodes run here, in the test's own loop."""

    cluster: Cluster
    nodes: dict[str, PacedNode]
    pace: Pace
    http: httpx.AsyncClient

    def kept(self, node_id: str) -> Kept:
        engine = self.nodes[node_id].engine
        assert engine is not None
        return engine.kept

    def set_slowdown(self, factor: float) -> None:
        for node in self.nodes.values():
            assert node.engine is not None
            node.engine.slowdown = factor

    def expected(self, prompt_ids: list[int], num_tokens: int) -> list[int]:
        return paced_tokens(prompt_ids, num_tokens, self.pace.words)


def fit(base_s: float = DECODE_STEP_S, prefill_token_s: float = PROMPT_TOKEN_S) -> StepFit:
    return StepFit(
        base_s=base_s,
        prefill_token_s=prefill_token_s,
        attended_token_s=0.0,
        sequence_s=0.0,
        context_token_s=0.0,
    )


@contextlib.asynccontextmanager
async def paced(
    folder: Path,
    model_path: Path,
    costs: StepFit,
    *,
    connectors: str = "shm,tcp",
    max_wait_s: int = 60,
    api_keys_file: Path | None = None,
    **counts: int,
) -> AsyncIterator[Paced]:
    """A cluster that is ready; afterwards its nodes hold nothing, and their books balance."""
    pace = pace_of(str(model_path), costs)
    wanted = variables(max_wait_s=max_wait_s, api_keys_file=api_keys_file or "")
    with services(folder, model_path, wanted) as cluster:
        limits = {"token_budget": CHUNK_TOKENS, "connectors": connectors}
        settings = node_settings(cluster, model_path, NUM_BLOCKS, **limits)
        async with (
            paced_nodes(settings, pace, counts) as nodes,
            httpx.AsyncClient(base_url=cluster.url, timeout=60) as http,
        ):
            await wait_linked(cluster.nats_url, len(nodes))
            await asyncio.to_thread(cluster.wait_ready, READY_TIMEOUT_S)
            yield Paced(cluster, nodes, pace, http)
            async with observe(cluster.nats_url) as observer:
                await observer.wait_idle(nodes)


def prompt_of(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1000, 30_000), k=num_tokens)


@pytest.mark.parametrize("connector", ["shm", "tcp"])
async def test_the_openai_api_over_paced_nodes(tmp_path: Path, model_path: Path, connector: str) -> None:
    """Prompts of several chunks move whole: the tokens are read out of the KV that was moved."""
    prompts = [prompt_of(num_tokens, seed) for seed, num_tokens in enumerate((1, 63, 64, 200, 333))]
    costs = fit(base_s=0.002, prefill_token_s=0.0)
    async with paced(tmp_path, model_path, costs, connectors=connector, prefill=1, decode=1) as system:
        async with observe(system.cluster.nats_url) as observer:
            transfers = await observer.events("flowkv.v1.event.kv_transferred.>")
            streams = await run_all(system.http, prompts, max_tokens=20)
            await transfers.wait_for_all(len(prompts))
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 7}
        answer = (await system.http.post("/v1/chat/completions", json=body)).json()
    for prompt, stream in zip(prompts, streams, strict=True):
        assert stream.error is None
        assert stream.token_ids == system.expected(prompt, 20)
        assert (stream.finish_reason, stream.saw_done) == ("length", True)
        assert len(stream.text.split()) == 20
    assert {event["connector"] for _, event in transfers.events} == {connector}
    assert answer["usage"]["completion_tokens"] == 7
    assert answer["choices"][0]["finish_reason"] == "length"
    assert len(answer["choices"][0]["message"]["content"].split()) == 7


async def test_deep_health_sends_kv_through_every_pair(tmp_path: Path, model_path: Path) -> None:
    async with paced(tmp_path, model_path, fit(base_s=0.002), prefill=2, decode=2) as system:
        async with observe(system.cluster.nats_url) as observer:
            transfers = await observer.events("flowkv.v1.event.kv_transferred.>")
            reply = await system.http.get("/health/deep")
            moved = await transfers.wait_for_all(4)
        again = (await system.http.get("/health/deep")).json()
    assert reply.status_code == 200
    found = reply.json()
    expected = sorted((f"prefill-{p}", f"decode-{d}") for p in range(2) for d in range(2))
    assert sorted((pair["prefill"], pair["decode"]) for pair in found["pairs"]) == expected
    assert all(pair["ok"] and pair["ms"] > 0 for pair in found["pairs"])
    assert sorted((event["prefill_node"], event["decode_node"]) for event in moved) == expected
    assert all(event["num_bytes"] > 0 for event in moved)
    assert (again["pairs"], len(transfers.events)) == (found["pairs"], 4)
    assert again["age_s"] > 0


async def test_steps_take_as_long_as_stated(tmp_path: Path, model_path: Path) -> None:
    num_outputs = 25
    async with paced(tmp_path, model_path, fit(), prefill=1, decode=1) as system:
        [outcome] = await drive(system.cluster.url, [Arrival(0.0, 2 * CHUNK_TOKENS, num_outputs)])
        prefill, decode = system.kept("prefill-0"), system.kept("decode-0")
    assert outcome.is_complete
    assert len(outcome.token_ids) == len(outcome.event_times_s) == num_outputs
    assert (prefill.num_steps, decode.num_steps) == (2, num_outputs - 1)
    assert prefill.stated_s == pytest.approx(2 * (DECODE_STEP_S + CHUNK_TOKENS * PROMPT_TOKEN_S))
    assert decode.stated_s == pytest.approx((num_outputs - 1) * DECODE_STEP_S)
    assert outcome.ttft_s is not None
    assert 1.0 <= outcome.ttft_s / prefill.stated_s < 2.0
    # The first of these gaps holds the handoff too.
    assert 0.95 <= sum(outcome.itls_s[1:]) / ((num_outputs - 2) * DECODE_STEP_S) < 1.3


async def test_a_burst_is_spread_over_both_sides(tmp_path: Path, model_path: Path) -> None:
    prompts = [prompt_of(100, seed) for seed in range(16)]
    async with paced(tmp_path, model_path, fit(), prefill=2, decode=2) as system:
        async with observe(system.cluster.nats_url) as observer:
            assignments = await observer.events("flowkv.v1.assignment.>")
            streams = await run_all(system.http, prompts, max_tokens=10)
            chosen = await assignments.wait_for_all(len(prompts))
        num_steps = {node_id: system.kept(node_id).num_steps for node_id in system.nodes}
    assert [stream.token_ids for stream in streams] == [system.expected(prompt, 10) for prompt in prompts]
    for side in ("prefill", "decode"):
        counts = Counter(assignment[side]["node_id"] for assignment in chosen)
        first, second = counts[f"{side}-0"], counts[f"{side}-1"]  # decode nodes may prefill, too
        assert min(first, second) > 0
        assert abs(first - second) <= 2
    assert all(num_steps.values())


async def test_an_overload_is_refused_at_once_and_passes(tmp_path: Path, model_path: Path) -> None:
    """100 s of prompts come at once, where 20 s are admitted; then the nodes get faster."""
    num_requests, num_prompt, num_outputs = 25, 400, 3
    async with paced(
        tmp_path, model_path, fit(prefill_token_s=0.01), max_wait_s=20, prefill=1, decode=1
    ) as system:
        async with observe(system.cluster.nats_url) as observer:
            reports = await observer.events("flowkv.v1.load.prefill-0")
            first = await stream_completion(system.http, prompt_of(CHUNK_TOKENS), max_tokens=2)
            assert first.error is None
            # Two reports on, the scheduler knows what the node has measured by it.
            await reports.wait_for_all(len(reports.events) + 2)
        burst = [Arrival(0.0, num_prompt, num_outputs)] * num_requests
        async with observe(system.cluster.nats_url) as observer:
            assignments = await observer.events("flowkv.v1.assignment.>")
            finished = await observer.events("flowkv.v1.event.request_finished.*")
            sending = asyncio.create_task(drive(system.cluster.url, burst))
            await assignments.wait_for_all(1)
            await finished.wait_for_all(1)  # a refusal: a prompt takes 4 s
        system.set_slowdown(0.001)
        outcomes = await sending
        after = await served_again(system, prompt_of(CHUNK_TOKENS, seed=1))
    refused = [outcome for outcome in outcomes if outcome.status == 429]
    accepted = [outcome for outcome in outcomes if outcome.status == 200]
    assert len(refused) + len(accepted) == num_requests
    assert refused
    assert accepted
    assert all(outcome.retry_after_s is not None and outcome.retry_after_s >= 1 for outcome in refused)
    assert max(outcome.ended_s for outcome in refused) < 0.05 * num_requests * num_prompt * 0.01
    assert all(outcome.is_complete and len(outcome.token_ids) == num_outputs for outcome in accepted)
    assert after.token_ids == system.expected(after.prompt_ids, 2)


@pytest.mark.full
async def test_one_request_does_not_wait_behind_a_hundred_of_another_key(
    tmp_path: Path, model_path: Path
) -> None:
    """Each computes for 0.14 s, so in the order of their age it would wait for as long as the TTFT target."""
    keys_file = tmp_path / "keys"
    keys_file.write_text("many sk-many\none sk-one\n")
    async with paced(
        tmp_path / "run", model_path, fit(), api_keys_file=keys_file, prefill=1, decode=1
    ) as system:
        limits = httpx.Limits(max_connections=None)
        many, one = (
            httpx.AsyncClient(
                base_url=system.cluster.url, timeout=120, limits=limits, headers={"x-api-key": key}
            )
            for key in ("sk-many", "sk-one")
        )
        async with many, one:
            alone_s = [await ttft_s(one, seed) for seed in range(7)]
            loaded_s = []
            for part in range(1, 8):
                prompts = [prompt_of(100, 100 * part + seed) for seed in range(100)]
                async with observe(system.cluster.nats_url) as observer:
                    assignments = await observer.events("flowkv.v1.assignment.>")
                    backlog = asyncio.create_task(run_all(many, prompts, max_tokens=20))
                    await assignments.wait_for_all(5)
                loaded_s.append(await ttft_s(one, 50 + part))
                assert not backlog.done()
                backlog.cancel()
                await asyncio.wait([backlog])
    # Behind the prompt that is being computed: 2 times, more on a busy host. Without turns it is 50 times.
    assert statistics.median(loaded_s) < 5 * statistics.median(alone_s), (alone_s, loaded_s)


async def ttft_s(http: httpx.AsyncClient, seed: int) -> float:
    began = time.monotonic()
    times_s: list[float] = []
    done = await stream_completion(
        http, prompt_of(100, seed), max_tokens=2, on_chunk=lambda _: times_s.append(time.monotonic() - began)
    )
    assert done.saw_done, done.error
    return times_s[0]


async def served_again(system: Paced, prompt_ids: list[int]) -> Streamed:
    """The first request that is not refused; one is sent with each load report: these tell of the end."""
    async with observe(system.cluster.nats_url) as observer, asyncio.timeout(10):
        reports = await observer.events("flowkv.v1.load.*")
        while True:
            answer = await stream_completion(system.http, prompt_ids, max_tokens=2)
            if answer.error is None:
                return answer
            assert answer.error["type"] == "rate_limit_error"
            await reports.wait_for_all(len(reports.events) + 1)


@pytest.mark.full
async def test_a_liar_loses_its_work_within_two_seconds(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It becomes ten times slower, and reports that it is idle and quick beyond all others."""
    honest, is_lying = reporting.load_report, asyncio.Event()

    def load_report(node: Node, seq: int, pool: str = "") -> LoadReport:
        report = honest(node, seq, pool)
        if node.ref.node_id != "prefill-0" or not is_lying.is_set():
            return report
        lie = fit(base_s=1e-6, prefill_token_s=1e-9)
        return msgspec.structs.replace(report, step=lie, queued_prefill_tokens=0, num_prompts=0)

    monkeypatch.setattr(reporting, "load_report", load_report)
    rate, num_before, num_after = 10, 20, 60
    async with paced(tmp_path, model_path, fit(), prefill=3, decode=1) as system:
        await drive(system.cluster.url, [Arrival(number / rate, 128, 2) for number in range(num_before)])
        engine = system.nodes["prefill-0"].engine
        assert engine is not None
        engine.slowdown = 10.0
        is_lying.set()
        async with observe(system.cluster.nats_url) as observer:
            assignments = await observer.events("flowkv.v1.assignment.>")
            arrivals = [Arrival(number / rate, 128, 2) for number in range(num_after)]
            outcomes = await drive(system.cluster.url, arrivals)
            chosen = await assignments.wait_for_all(num_after)
        engine.slowdown = 1.0
    assert all(outcome.is_complete for outcome in outcomes)
    late = [assignment["prefill"]["node_id"] for assignment in chosen[2 * rate :]]
    assert late.count("prefill-0") < 0.15 * len(late)


@pytest.mark.full
async def test_sequences_leave_a_decode_node_that_becomes_slow(tmp_path: Path, model_path: Path) -> None:
    """On it they would take over a minute. The text goes on, token by token."""
    prompts, num_outputs = [prompt_of(100, seed) for seed in range(6)], 120
    running = asyncio.Event()

    def look(stream: Streamed) -> None:
        if len(stream.token_ids) == 10:
            running.set()

    async with paced(tmp_path, model_path, fit(), prefill=1, decode=2) as system:

        async def slow_down() -> None:
            await running.wait()
            engine = system.nodes["decode-0"].engine
            assert engine is not None
            engine.slowdown = 50.0

        async with observe(system.cluster.nats_url) as observer:
            ends = await observer.events("flowkv.v1.event.request_finished.>")
            async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
                tasks.create_task(slow_down())
                streams = [
                    tasks.create_task(
                        stream_completion(system.http, ids, max_tokens=num_outputs, on_chunk=look)
                    )
                    for ids in prompts
                ]
            finished = await ends.wait_for_all(len(prompts))
    for prompt, stream in zip(prompts, streams, strict=True):
        assert stream.result().token_ids == system.expected(prompt, num_outputs)
    assert {event["decode_node"] for event in finished} == {"decode-1"}
    assert 0 < sum(event["attempts"] == 2 for event in finished) < len(prompts)
    assert all(event["attempts"] <= 2 for event in finished)
