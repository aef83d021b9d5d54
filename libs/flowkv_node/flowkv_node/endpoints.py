"""What a node is asked over NATS, apart from the work of its roles: `flowkv.v1.node.<verb>.<node_id>`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from itertools import islice

from flowkv_common import __version__
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.errors import BadRequest, Stale
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Accepted, Cancel
from flowkv_common.wire.nodes import (
    BlockList,
    Check,
    Checked,
    Cordon,
    Drain,
    LinkOffer,
    LinkRequest,
    ListBlocks,
    ResumeNode,
    SetPrefillCap,
    Wedge,
)
from flowkv_engine.engine.runner import Engine
from flowkv_node.node import Node
from flowkv_node.reporting import BlockNews

log = logging.getLogger(__name__)

MAX_SLOWER_LINKS = 8  # as an example: what is wrong with one is wrong with all


@contextlib.asynccontextmanager
async def serve_endpoints(node: Node, engine: Engine, news: BlockNews) -> AsyncIterator[None]:
    """One ADR-32 service for each role and one for the node, found by `nats micro ls`."""

    def metadata() -> dict[str, str]:
        """What `nats micro info` shows of each of the three."""
        return {
            "role": node.starts_as,
            "model": node.card.name,
            "incarnation": node.ref.incarnation,
            "state": node.why_not_ready() or "ready",
            "slower_links": "; ".join(islice(node.links.why_slower.values(), MAX_SLOWER_LINKS)),
        }

    endpoints = {
        "prefill": node.prefill.endpoints(),
        "decode": node.decode.endpoints(),
        "node": node_endpoints(node, engine, news),
    }
    async with contextlib.AsyncExitStack() as stack:
        for name, mine in endpoints.items():
            service = Service(
                node.bus,
                name=name,
                version=__version__,
                service_id=node.ref.node_id,
                metadata=metadata,
                endpoints=mine,
            )
            await stack.enter_async_context(service)
        yield


def node_endpoints(node: Node, engine: Engine, news: BlockNews) -> list[Endpoint]:
    """Those of the node itself; `wedge` only where test hooks are on."""
    accepted = Accepted(node_id=node.ref.node_id)

    async def link(request: LinkRequest) -> LinkOffer:
        node.refuse_misdirected(request.node)
        return node.links.offer(request)

    async def drain(request: Drain) -> Accepted:
        node.drain()
        log.info("draining %s: %s", node.ref.node_id, request.reason or "asked to")
        return accepted

    async def cordon(request: Cordon) -> Accepted:
        node.cordon()
        log.info("cordoned %s: %s", node.ref.node_id, request.reason or "asked to")
        return accepted

    async def resume(_: ResumeNode) -> Accepted:
        node.resume()
        log.info("%s takes new work again", node.ref.node_id)
        return accepted

    async def check(_: Check) -> Checked:
        node.blocks.check_integrity()
        return Checked(
            node=node.ref,
            blocks=node.blocks.counts(),
            num_requests=len(node.attempts),
            num_reservations=node.reservations.num_open,
        )

    async def set_cap(request: SetPrefillCap) -> Accepted:
        """From the next step on. The same budget again is accepted and changes nothing."""
        node.refuse_misdirected(request.node)
        if request.epoch < node.epoch:
            raise Stale(f"epoch {request.epoch} is over, {node.ref.node_id} has heard of {node.epoch}")
        node.hear_epoch(request.epoch)
        old, new = node.max_prefill_tokens_per_step, request.max_prefill_tokens_per_step
        least, most = node.settings.block_size, node.settings.token_budget
        if not least <= new <= most:
            raise BadRequest(
                f"the prefill chunk budget lies between {least} and {most} tokens, not at {new}",
                field="max_prefill_tokens_per_step",
            )
        node.changed.set()
        if new != old:
            node.max_prefill_tokens_per_step = new
            node.wake.set()
            node.instruments.chunk_budget_changes.inc()
            log.info(
                "the prefill chunk budget goes from %d to %d tokens per step: %s", old, new, request.reason
            )
        return accepted

    async def list_blocks(request: ListBlocks) -> BlockList:
        node.refuse_misdirected(request.node)
        return news.page(request.page)

    async def wedge(request: Wedge) -> Accepted:
        engine.wedge(request.for_s)
        return accepted

    endpoints = [
        node.endpoint(subjects.NODE_LINK, LinkRequest, link),
        node.endpoint(subjects.NODE_DRAIN, Drain, drain),
        node.endpoint(subjects.NODE_CORDON, Cordon, cordon),
        node.endpoint(subjects.NODE_RESUME, ResumeNode, resume),
        node.endpoint(subjects.NODE_CHECK, Check, check),
        node.endpoint(subjects.NODE_CAP, SetPrefillCap, set_cap),
        node.endpoint(subjects.NODE_BLOCKS, ListBlocks, list_blocks),
    ]
    if node.settings.test_hooks:
        endpoints.append(node.endpoint(subjects.NODE_WEDGE, Wedge, wedge))
    return endpoints


async def watch_cancels(node: Node) -> None:
    """Until cancelled: stop the attempts that gateways cancel, wherever they stand."""

    def cancel(message: Cancel) -> None:
        node.attempts.cancel(message.transfer_id, is_cut_off=message.goes_on)
        node.wake.set()

    mine = subjects.at(subjects.NODE_CANCEL, node.ref.node_id)
    async with (
        await node.bus.subscribe(mine, Cancel, cancel),
        await node.bus.subscribe(subjects.CANCEL_ALL, Cancel, cancel),
    ):
        await asyncio.Event().wait()
