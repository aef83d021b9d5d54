"""What a node keeps an eye on: cancels, things that expire, and whether engine and handoffs make progress."""

from __future__ import annotations

import asyncio
import logging
import time

from nats.aio.msg import Msg

from flowkv_common.engine.engine import Engine
from flowkv_common.errors import Unavailable
from flowkv_common.node.attempts import Cause
from flowkv_common.node.guest import Node
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Cancel

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
