"""What a node keeps an eye on: cancels, things that expire, and whether engine and handoffs make progress."""

from __future__ import annotations

import asyncio
import logging
import time

from nats.aio.msg import Msg

from flowkv_common.bus.service import Endpoint
from flowkv_common.errors import BadRequest, Stale, Unavailable
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Accepted, Cancel, Message
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
from flowkv_engine.engine.runner import Engine
from flowkv_node.attempts import Cause
from flowkv_node.node import Node
from flowkv_node.reporting import BlockNews
from flowkv_node.steps import Steps

log = logging.getLogger(__name__)

SWEEP_PERIOD_S = 0.5
CHECK_PERIOD_S = 10.0


async def watch_cancels(node: Node) -> None:
    """Until cancelled: stop the attempts that gateways cancel, wherever they stand."""

    def cancel(message: Cancel, _: Msg) -> None:
        node.attempts.cancel(message.transfer_id, Cause.UNWANTED)
        node.wake.set()

    mine = subjects.at(subjects.NODE_CANCEL, node.ref.node_id)
    async with (
        await node.bus.subscribe(mine, Cancel, cancel),
        await node.bus.subscribe(subjects.CANCEL_ALL, Cancel, cancel),
    ):
        await asyncio.Event().wait()


async def sweep(node: Node) -> None:
    """Until cancelled: drop reservations that have expired, also when nothing new arrives.

    What a drain has not finished in time goes back to the gateways, which try elsewhere. An idle node goes
    through its books too. Raises IntegrityError if a block is lost: a node that can't count its blocks must
    not serve.
    """
    checked_at = 0.0
    while True:
        await asyncio.sleep(SWEEP_PERIOD_S)
        if not len(node.attempts) and time.monotonic() - checked_at > CHECK_PERIOD_S:
            node.blocks.check_integrity()
            checked_at = time.monotonic()
        if node.drains_until is not None and time.monotonic() > node.drains_until and len(node.attempts):
            await node.fail_all(Unavailable(f"{node.ref.node_id} is draining"))
        if not node.bus.is_settled:
            continue  # who has reserved could not renew
        for transfer_id in node.reservations.sweep():
            log.info("reservation %s expired", transfer_id)
            node.attempts.end(transfer_id)
            node.wake.set()


async def watch_engine(node: Node, engine: Engine) -> None:
    """Until cancelled: a step that takes far too long makes the node unready and gives its work back.

    The blocks of the stuck step stay held until it ends, if it ever does; then the node is ready again.
    """
    while True:
        await asyncio.sleep(SWEEP_PERIOD_S)
        busy_since = engine.busy_since
        stuck = busy_since is not None and time.monotonic() - busy_since > node.settings.wedge_timeout_s
        if stuck == node.wedged:
            continue
        node.wedged = stuck
        node.changed.set()
        if stuck:
            log.error("the engine has made no progress for %.1f s", node.settings.wedge_timeout_s)
            await node.fail_all(Unavailable(f"the engine of {node.ref.node_id} is stuck"))
        else:
            log.warning("the engine makes progress again")


async def watch_handoffs(node: Node) -> None:
    """Until cancelled: handoffs that make no progress make the node unready, and are given back.

    The node is ready again once they have let go of their budget. One that can't be ended, such as a thread
    that waits for a device for ever, keeps it unready.
    """
    while True:
        await asyncio.sleep(SWEEP_PERIOD_S)
        reason = node.budget.why_stuck()
        if (reason is None) != (node.stuck is None):
            node.changed.set()
            log.log(
                logging.ERROR if reason else logging.WARNING, reason or "all handoffs make progress again"
            )
        node.stuck = reason
        stuck = [node.attempts.find(handoff.transfer_id) for handoff in node.budget.find_stuck()]
        if attempts := [attempt for attempt in stuck if attempt is not None]:
            await node.fail(attempts, Unavailable(f"{node.ref.node_id}: {reason}"))


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
