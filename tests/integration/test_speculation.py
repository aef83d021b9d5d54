"""Nodes that guess tokens answer as those that don't, wherever an answer runs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from typing import Any

import pytest

from flowkv_common.bus.connection import Bus
from flowkv_common.wire.messages import Grammar, NodeRef, SamplingParams
from flowkv_engine.engine.model import LoadedModel
from tests.drive import load_tiny
from tests.gateway_support import EOS, write_tokenizer
from tests.live_nodes import Client, check, client, live_node, one_node
from tests.nats_server import NatsServer
from tests.tiny_models import make_tiny_model

PROMPT = [5, 6, 7, 8, 9]
# Few words, so that text repeats and guesses are often right, and often wrong.
WORDS = [40, 41]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), eos_token_id=EOS)
    return load_tiny(write_tokenizer(folder))


def asked(**fields: Any) -> SamplingParams:
    defaults = {"max_tokens": 40, "ignore_eos": True, "seed": 1, "allowed_token_ids": WORDS}
    return SamplingParams(**{**defaults, **fields})


KINDS = [
    asked(temperature=0.0),
    asked(temperature=1.0, num_logprobs=2),
    asked(temperature=0.7, frequency_penalty=0.1, repetition_penalty=1.1),
    asked(stop_token_ids=[WORDS[1]], min_tokens=20),
    asked(allowed_token_ids=[], grammar=Grammar(kind="regex", text="(ab|ac)+")),
]


async def answers(
    mine: Client, prefill: NodeRef, decode: NodeRef, kinds: Iterable[SamplingParams]
) -> list[list[int]]:
    """All at once."""
    outputs = await asyncio.gather(*(mine.answer(prefill, decode, PROMPT, kind) for kind in kinds))
    return [[output.token_ids[index] for index in sorted(output.token_ids)] for output in outputs]


def counted(metrics: str, name: str) -> float:
    found = re.search(rf"^vllm:{name}_total\S* (\S+)$", metrics, re.MULTILINE)
    assert found is not None
    return float(found[1])


@pytest.mark.full
async def test_answers_with_guesses_are_those_without(nats_server: NatsServer, model: LoadedModel) -> None:
    async with one_node(nats_server, model, attention="cpu", speculation="off") as node:
        expected = await answers(node.client, node.ref, node.ref, KINDS)
        assert counted((await node.get("/metrics")).text, "spec_decode_num_draft_tokens") == 0
    async with one_node(nats_server, model, attention="cpu") as node:
        assert await answers(node.client, node.ref, node.ref, KINDS) == expected
        metrics = (await node.get("/metrics")).text
        assert (await check(node.bus, "n0")).blocks.leased == 0
    drafted = counted(metrics, "spec_decode_num_draft_tokens")
    assert drafted > counted(metrics, "spec_decode_num_accepted_tokens") > 0


@pytest.mark.full
async def test_on_two_nodes_with_few_blocks_and_any_seed(
    nats_server: NatsServer, bus: Bus, model: LoadedModel
) -> None:
    """Handoffs, and preemptions: room for some of them at a time."""
    kinds = [
        asked(temperature=temperature, seed=seed, num_logprobs=seed % 3 or None)
        for seed in range(6)
        for temperature in (0.0, 0.6, 1.2)
    ]
    async with one_node(nats_server, model, attention="cpu", speculation="off") as node:
        expected = await answers(node.client, node.ref, node.ref, kinds)
    async with (
        live_node(nats_server, bus, model, "n1", attention="cpu") as first,
        live_node(nats_server, bus, model, "n2", attention="cpu", num_blocks=24, peers=1) as second,
        client(bus, model.card.fingerprint) as mine,
    ):
        for _ in range(3):
            assert await answers(mine, first, second, kinds) == expected
        assert (await check(bus, "n2")).blocks.leased == 0
