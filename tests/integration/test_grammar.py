"""Grammars on real nodes: an answer is the same wherever it goes on."""

from __future__ import annotations

import asyncio
import re

import pytest

from flowkv_common.bus.connection import Bus
from flowkv_common.errors import BadRequest
from flowkv_common.wire.messages import Grammar
from flowkv_engine.engine.model import LoadedModel
from flowkv_gateway.tokenizer import Tokenizer
from tests.drive import load_tiny
from tests.gateway_support import EOS, write_tokenizer
from tests.live_nodes import check, client, live_node, one_node
from tests.nats_server import NatsServer
from tests.tiny_models import make_tiny_model

PROMPT = [5] * 20
LIST = r"\[([a-z]{1,9}, ){12}[a-z]{1,9}\]"
LISTS = Grammar(kind="regex", text=LIST)
MAX_TOKENS = 180


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), eos_token_id=EOS)
    return load_tiny(write_tokenizer(folder))


async def test_a_handoff_goes_on_within_the_grammar(
    nats_server: NatsServer, bus: Bus, model: LoadedModel, tokenizer: Tokenizer
) -> None:
    async with (
        live_node(nats_server, bus, model, "n0") as first,
        live_node(nats_server, bus, model, "n1", peers=1) as second,
        client(bus, model.card.fingerprint) as mine,
    ):
        here = await mine.generate(first, first, PROMPT, max_tokens=MAX_TOKENS, grammar=LISTS)
        text = await tokenizer.decode(here)
        assert re.fullmatch(LIST, text)  # its last token ended it, long before `max_tokens`
        assert await mine.generate(first, second, PROMPT, max_tokens=MAX_TOKENS, grammar=LISTS) == here


async def test_a_preempted_answer_goes_on_within_the_grammar(
    nats_server: NatsServer, model: LoadedModel
) -> None:
    async with one_node(nats_server, model, num_blocks=16) as node:  # enough for one, not for three

        async def answer(place: int) -> list[int]:
            prompt_ids = [*PROMPT, place]
            return await node.client.generate(
                node.ref, node.ref, prompt_ids, max_tokens=MAX_TOKENS, grammar=LISTS
            )

        alone = [await answer(place) for place in range(3)]
        assert await asyncio.gather(*map(answer, range(3))) == alone
        metrics = (await node.get("/metrics")).text
        preemptions = re.search(r"^\S*preemptions_total\S* (\S+)$", metrics, re.MULTILINE)
        assert preemptions is not None
        assert float(preemptions[1]) > 0


async def test_a_grammar_that_fails_costs_its_request_alone(
    nats_server: NatsServer, model: LoadedModel
) -> None:
    async with one_node(nats_server, model) as node:

        async def answer(grammar: Grammar | None) -> list[int]:
            return await node.client.generate(node.ref, node.ref, PROMPT, max_tokens=9, grammar=grammar)

        expected = await answer(None)
        good, bad = await asyncio.gather(
            answer(None), answer(Grammar(kind="regex", text="(")), return_exceptions=True
        )
        assert good == expected
        assert isinstance(bad, BadRequest)
        async with asyncio.timeout(5):
            while (await check(node.bus, "n0")).blocks.leased:
                pass
