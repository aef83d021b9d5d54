"""Log probabilities of prompts: from real nodes to the gateway, whole or not at all."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from flowkv_common.bus.connection import Bus
from flowkv_common.errors import FlowKVError, Unavailable
from flowkv_common.wire.messages import PrefillRun, SamplingParams, TokenChunk, TokenLogprob
from flowkv_engine.engine.model import LoadedModel
from flowkv_gateway.request_state import RequestState
from flowkv_prefill import prompts
from tests.integration.test_dispatch import Nodes, chunk, cluster, failure, tid_of, tokens
from tests.live_nodes import TOKEN_BUDGET, client, live_node, one_node
from tests.nats_server import NatsServer
from tests.oracle import load_reference

LONG = [(7 * i) % 300 + 20 for i in range(TOKEN_BUDGET + 37)]  # in several chunks
ASKED = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, num_prompt_logprobs=2)


@pytest.fixture(scope="module")
def reference(model_path: Path) -> Any:
    return load_reference(model_path)


@torch.inference_mode()
def check(reference: Any, prompt_ids: list[int], got: list[TokenLogprob]) -> None:
    expected = reference(torch.tensor([prompt_ids])).logits[0, :-1].log_softmax(-1)
    assert [one.token_id for one in got] == prompt_ids[1:]
    for one, row in zip(got, expected, strict=True):
        values = [one.logprob, *(value for _, value in one.top)]
        ids = [one.token_id, *(token_id for token_id, _ in one.top)]
        assert values == pytest.approx(row[ids].tolist(), abs=1e-3)
        assert ids[1:] == row.topk(2).indices.tolist()


async def test_a_pair_gives_those_of_transformers_also_of_what_is_cached(
    nats_server: NatsServer, bus: Bus, model: LoadedModel, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces smaller than a step, over shared memory, several in one step."""
    monkeypatch.setattr(prompts, "MAX_LOGPROBS_PER_CHUNK", 9)
    async with (
        live_node(nats_server, bus, model, "p", role="prefill") as p,
        live_node(nats_server, bus, model, "d", role="decode", peers=1) as d,
        client(bus, model.card.fingerprint) as mine,
    ):
        plain = await mine.generate(p, d, LONG, max_tokens=4)
        others = [LONG[:20] + [place] * 9 for place in range(3)]
        outputs = await asyncio.gather(*(mine.answer(p, d, one, ASKED) for one in [LONG, *others, LONG]))
        for prompt_ids, output in zip([LONG, *others, LONG], outputs, strict=True):
            check(reference, prompt_ids, output.prompt_logprobs)
            assert output.num_cached_tokens == 0
        assert list(outputs[0].token_ids.values()) == plain
        # What asks for none finds what the others have left.
        after = await mine.answer(p, d, others[0], msgspec.structs.replace(ASKED, num_prompt_logprobs=None))
        assert after.num_cached_tokens > 0
        assert after.prompt_logprobs == []


async def test_a_preempted_answer_tells_of_its_prompt_once(
    nats_server: NatsServer, model: LoadedModel, reference: Any
) -> None:
    asked = msgspec.structs.replace(ASKED, max_tokens=60)
    several = [LONG[place : place + 20] for place in range(3)]
    async with one_node(nats_server, model, num_blocks=16) as node:  # enough for one, not for three
        outputs = await asyncio.gather(
            *(node.client.answer(node.ref, node.ref, prompt_ids, asked) for prompt_ids in several)
        )
        for prompt_ids, output in zip(several, outputs, strict=True):
            check(reference, prompt_ids, output.prompt_logprobs)
        metrics = (await node.get("/metrics")).text
        preemptions = re.search(r"^\S*preemptions_total\S* (\S+)$", metrics, re.MULTILINE)
        assert preemptions is not None
        assert float(preemptions[1]) > 0


# --- at the gateway -----------------------------------------------------------------------------------

PROMPT = [1, 2, 3, 4]


def asking() -> RequestState:
    return RequestState("r", PROMPT, SamplingParams(max_tokens=2, num_prompt_logprobs=0), 10.0, "f")


def piece(run: PrefillRun, first: int, end: int) -> TokenChunk:
    entries = [TokenLogprob(token_id=PROMPT[at], logprob=-float(at)) for at in range(first, end)]
    return TokenChunk(
        transfer_id=tid_of(run),
        index=len(run.output_ids),
        token_ids=[],
        prompt_logprobs=entries,
        prompt_index=first,
    )


async def whole(nodes: Nodes, run: PrefillRun) -> None:
    if run.sampling.num_prompt_logprobs is not None:
        await nodes.send(run, piece(run, 1, 3), node_id="p")
        await nodes.send(run, piece(run, 3, 4), chunk(tid_of(run), len(run.output_ids), [10]), node_id="p")
    else:
        await nodes.send(run, chunk(tid_of(run), len(run.output_ids), [10]), node_id="p")
    await nodes.send(run, chunk(tid_of(run), len(run.output_ids) + 1, [11], "length"))


async def test_pieces_come_before_the_first_token(nats_server: NatsServer) -> None:
    async with cluster(nats_server, whole) as (dispatch, nodes):
        request = asking()
        chunks = [one async for one in dispatch.generate(request)]
        assert [one.token_ids for one in chunks] == [[10], [11]]
        assert [one.logprob for one in request.prompt_logprobs] == [-1.0, -2.0, -3.0]
        assert nodes.asked[0].block_hashes == []


async def test_a_lost_piece_costs_the_attempt(nats_server: NatsServer) -> None:
    async def lose_one(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.send(run, piece(run, 1, 2), node_id="p")
        await nodes.send(run, piece(run, 3, 4), chunk(tid_of(run), 0, [99]), node_id="p")

    async with cluster(nats_server, lose_one, whole) as (dispatch, nodes):
        request = asking()
        assert tokens([one async for one in dispatch.generate(request)]) == [10, 11]
        assert [one.token_id for one in request.prompt_logprobs] == PROMPT[1:]
        assert [run.sampling.num_prompt_logprobs for run in nodes.runs] == [0, 0]


@pytest.mark.parametrize(("num_told", "asked_again"), [(3, None), (2, 0)])
async def test_what_a_failed_attempt_has_told_is_not_computed_again(
    nats_server: NatsServer, num_told: int, asked_again: int | None
) -> None:
    error: FlowKVError = Unavailable("stuck")

    async def fail(nodes: Nodes, run: PrefillRun) -> None:
        await nodes.send(run, piece(run, 1, 1 + num_told), failure(tid_of(run), error), node_id="p")

    async with cluster(nats_server, fail, whole) as (dispatch, nodes):
        request = asking()
        assert tokens([one async for one in dispatch.generate(request)]) == [10, 11]
        assert [one.token_id for one in request.prompt_logprobs] == PROMPT[1:]
        assert [run.sampling.num_prompt_logprobs for run in nodes.runs] == [0, asked_again]
