"""What a node's load reports count, and when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from flowkv_common.errors import BadRequest
from flowkv_common.wire.nodes import length_class
from flowkv_engine.engine.model import LoadedModel
from flowkv_node.reporting import MAX_UNUSUAL_LINKS, load_report
from tests.engineless import engineless_pair
from tests.live_nodes import BLOCK_SIZE, LiveNode, first, one_node
from tests.nats_server import NatsServer


@pytest.fixture
async def node(nats_server: NatsServer, model: LoadedModel) -> AsyncIterator[LiveNode]:
    async with one_node(nats_server, model) as node:
        yield node


async def test_a_reservation_shows_its_blocks_and_itself_at_the_same_time(node: LiveNode) -> None:
    reserved = await node.client.reserve(node.ref, 5 * BLOCK_SIZE)
    assert (
        await node.client.reserve(node.ref, 5 * BLOCK_SIZE, token=reserved.token) == reserved
    )  # renewed: the same room
    shown = await first(node.heard, lambda report: report.blocks.leased > 0 or report.num_rooms_given > 0)
    assert (shown.blocks.leased, shown.num_rooms_given, shown.num_sequences_accepted) == (5, 1, 0)


async def test_room_on_the_node_of_the_prompt_counts_too(node: LiveNode) -> None:
    await node.generate([30] * 20, max_tokens=3)
    done = await first(node.heard, lambda report: report.num_sequences_accepted > 0)
    assert (done.num_prompts_accepted, done.num_rooms_given, done.num_sequences_accepted) == (1, 1, 1)


async def test_prompts_and_sequences_are_told_apart(node: LiveNode) -> None:
    held = await node.client.reserve(node.ref, 63 * BLOCK_SIZE)  # of 64: a prompt must wait
    async with asyncio.TaskGroup() as tasks:
        output = tasks.create_task(node.generate([30] * 20, max_tokens=60))
        queued = await first(node.heard, lambda report: report.queued_prefill_tokens > 0)
        assert (queued.num_prompts, queued.num_waiting, queued.num_running) == (1, 0, 0)
        await node.client.release(node.ref, held)
        decoding = await first(node.heard, lambda report: report.num_running > 0)
        assert (decoding.num_prompts, decoding.num_waiting, decoding.num_running) == (0, 0, 1)
    assert len(output.result()) == 60


async def test_what_is_left_of_outputs_is_told_from_their_max_tokens(node: LiveNode) -> None:
    async with asyncio.TaskGroup() as tasks:
        output = tasks.create_task(node.generate([30] * 20, max_tokens=60))
        decoding = await first(node.heard, lambda report: report.num_running > 0)
        assert decoding.forecast is not None
        assert 0 < decoding.forecast.tokens_left < 60
        assert decoding.forecast.by_length.keys() == {length_class(20)}
        ended = await first(
            node.heard, lambda report: report.num_sequences_accepted > 0 == report.num_running
        )
        assert ended.forecast is not None
        assert ended.forecast.tokens_left == 0
        # It did not end of itself: so others are taken to go on, too.
        assert ended.forecast.stop_rate < decoding.forecast.stop_rate * 1.01
        assert (
            ended.forecast.by_length[length_class(20)][0] > decoding.forecast.by_length[length_class(20)][0]
        )
    assert len(output.result()) == 60


async def test_a_prompt_that_fills_the_pool_to_the_brim_is_refused_at_once(
    nats_server: NatsServer, model: LoadedModel
) -> None:
    """Its next token has no place: it would wait for a block that there is not, until its deadline."""
    brim = 16 * BLOCK_SIZE
    async with one_node(nats_server, model, num_blocks=16) as node:
        assert len(await node.generate([30] * (brim - 1), max_tokens=1)) == 1
        async with asyncio.timeout(5):
            with pytest.raises(BadRequest, match="needs 17 blocks"):
                await node.generate([30] * brim, max_tokens=1)


async def test_only_links_by_another_connector_than_most_are_named(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engineless_pair(nats_server) as pair:
        node = pair.p.node
        linked = load_report(node, 1)
        assert (linked.num_links, linked.usual_connector, linked.links) == (1, "inprocess", {})
        near = {f"decode-{place:04}": "shm" for place in range(7)}
        far = {f"prefill-{place:04}": "tcp" for place in range(4000)}
        monkeypatch.setattr(node.links, "connectors_in_use", lambda: near | far)
        many = load_report(node, 2)
        assert (many.num_links, many.usual_connector, many.links) == (4007, "tcp", near)
        halves = dict.fromkeys(list(far)[:1999], "shm")
        monkeypatch.setattr(node.links, "connectors_in_use", lambda: near | far | halves)
        assert len(load_report(node, 3).links) == MAX_UNUSUAL_LINKS
        monkeypatch.setattr(node.links, "connectors_in_use", dict)
        assert load_report(node, 4).usual_connector == ""
