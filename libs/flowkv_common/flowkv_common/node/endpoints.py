"""The endpoints that every node has, whatever its guests: link, drain, check, blocks, and the test hook."""

from __future__ import annotations

from flowkv_common.bus.service import Endpoint
from flowkv_common.engine.runner import EngineThread
from flowkv_common.node.block_news import BlockNews
from flowkv_common.node.guest import Node
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import (
    Accepted,
    BlockList,
    Check,
    Checked,
    Drain,
    LinkOffer,
    LinkRequest,
    ListBlocks,
    Message,
    Wedge,
)


def node_endpoints(node: Node, engine: EngineThread, news: BlockNews) -> list[Endpoint]:
    """`flowkv.v1.node.<verb>.<node_id>`; `wedge` only where test hooks are on."""

    async def link(request: LinkRequest) -> LinkOffer:
        node.refuse_other_life(request.node)
        return node.links.offer(request)

    async def drain(_: Drain) -> Message:
        node.stop.set()
        return Accepted(node_id=node.ref.node_id)

    async def check(_: Check) -> Checked:
        node.blocks.check_integrity()
        return Checked(
            node=node.ref,
            blocks=node.blocks.counts(),
            num_requests=len(node.attempts),
            num_reservations=node.reservations.num_open,
        )

    async def list_blocks(request: ListBlocks) -> BlockList:
        node.refuse_other_life(request.node)
        return news.page(request.page)

    async def wedge(request: Wedge) -> Message:
        engine.wedge(request.for_s)
        return Accepted(node_id=node.ref.node_id)

    def at(subject: str) -> str:
        return subjects.at(subject, node.ref.node_id)

    endpoints = [
        Endpoint(at(subjects.NODE_LINK), LinkRequest, link),
        Endpoint(at(subjects.NODE_DRAIN), Drain, drain),
        Endpoint(at(subjects.NODE_CHECK), Check, check),
        Endpoint(at(subjects.NODE_BLOCKS), ListBlocks, list_blocks),
    ]
    if node.settings.test_hooks:
        endpoints.append(Endpoint(at(subjects.NODE_WEDGE), Wedge, wedge))
    return endpoints
