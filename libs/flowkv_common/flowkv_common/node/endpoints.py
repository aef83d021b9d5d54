"""The endpoints that every node has, whatever its guests, from link and drain to the test hook."""

from __future__ import annotations

import logging

from flowkv_common.bus.service import Endpoint
from flowkv_common.engine.engine import Engine
from flowkv_common.errors import BadRequest, Stale
from flowkv_common.node.block_news import BlockNews
from flowkv_common.node.guest import Node
from flowkv_common.node.steps import Steps
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Accepted, Message
from flowkv_common.wire.nodes import (
    BlockList,
    Check,
    Checked,
    Drain,
    LinkOffer,
    LinkRequest,
    ListBlocks,
    ResumeNode,
    SetPrefillCap,
    Wedge,
)

log = logging.getLogger(__name__)


def node_endpoints(node: Node, steps: Steps, engine: Engine, news: BlockNews) -> list[Endpoint]:
    """`flowkv.v1.node.<verb>.<node_id>`; `wedge` only where test hooks are on."""

    async def link(request: LinkRequest) -> LinkOffer:
        node.refuse_other_life(request.node)
        return node.links.offer(request)

    async def drain(request: Drain) -> Message:
        node.drain()
        log.info("draining %s: %s", node.ref.node_id, request.reason or "asked to")
        return Accepted(node_id=node.ref.node_id)

    async def resume(_: ResumeNode) -> Message:
        node.resume()
        log.info("%s takes new work again", node.ref.node_id)
        return Accepted(node_id=node.ref.node_id)

    async def check(_: Check) -> Checked:
        node.blocks.check_integrity()
        return Checked(
            node=node.ref,
            blocks=node.blocks.counts(),
            num_requests=len(node.attempts),
            num_reservations=node.reservations.num_open,
        )

    async def cap(request: SetPrefillCap) -> Message:
        set_prefill_cap(node, steps, request)
        return Accepted(node_id=node.ref.node_id)

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
        Endpoint(at(subjects.NODE_RESUME), ResumeNode, resume),
        Endpoint(at(subjects.NODE_CHECK), Check, check),
        Endpoint(at(subjects.NODE_CAP), SetPrefillCap, cap),
        Endpoint(at(subjects.NODE_BLOCKS), ListBlocks, list_blocks),
    ]
    if node.settings.test_hooks:
        endpoints.append(Endpoint(at(subjects.NODE_WEDGE), Wedge, wedge))
    return endpoints


def set_prefill_cap(node: Node, steps: Steps, request: SetPrefillCap) -> None:
    """Make the node more of a prefill or more of a decode node, from the next step on.

    Raises Stale for a message to a former life or from a leader of an older epoch, BadRequest for a cap below
    one block or above the token budget. The same cap again is accepted and changes nothing.
    """
    node.refuse_other_life(request.node)
    if request.epoch < node.epoch:
        raise Stale(f"epoch {request.epoch} is over, {node.ref.node_id} has heard of {node.epoch}")
    node.hear_epoch(request.epoch)
    old, new = steps.max_prefill_tokens_per_step, request.max_prefill_tokens_per_step
    least, most = node.settings.block_size, node.settings.token_budget
    if not least <= new <= most:
        raise BadRequest(
            f"the cap lies between {least} and {most} tokens, not at {new}",
            field="max_prefill_tokens_per_step",
        )
    node.changed.set()
    if new == old:
        return
    steps.max_prefill_tokens_per_step = new
    node.wake.set()
    node.instruments.count_cap_change()
    log.info("the prefill cap goes from %d to %d tokens per step: %s", old, new, request.reason)
