"""Carries out what the planner orders, and tells everyone: caps of nodes, regimes, nodes that are wanted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge

from flowkv_common.bus.connection import Bus
from flowkv_common.bus.lease import Lease
from flowkv_common.errors import FlowKVError
from flowkv_common.wire import nodes, subjects
from flowkv_common.wire.messages import Accepted
from flowkv_common.wire.nodes import CapMoved, RegimeChanged, SetPrefillCap
from flowkv_common.wire.parts import NodeRef
from flowkv_scheduler.orders import MoveCap, Order, RegimeChange, ScaleWanted
from flowkv_scheduler.regimes import IMBALANCE, NORMAL, OVERLOAD

log = logging.getLogger(__name__)

# As long as the planner's period: what has failed by then is asked anew by what it orders next.
ORDER_TIMEOUT_S = 0.5


class Orders:
    """The hands of a leader. `cap_of` gives the cap in a node's last report, None if there is none.

    Nothing is kept for later: an order that fails is logged, and the planner orders it again if it still
    wants it. Metrics speak only while we lead.
    """

    def __init__(
        self, bus: Bus, lease: Lease, registry: CollectorRegistry, cap_of: Callable[[NodeRef], int | None]
    ) -> None:
        self._bus = bus
        self._lease = lease
        self._cap_of = cap_of
        self._regime = NORMAL
        self._wanted: dict[str, int] = {}  # role -> change, as last told
        self._num_moves = Counter("flowkv_cap_moves", "Prefill caps moved", registry=registry)
        self._regimes = Gauge("flowkv_regime", "1 for what the leader sees", ["regime"], registry=registry)
        self._scale = Gauge(
            "flowkv_scale_wanted",
            "Nodes to add, or take away, to meet the goals",
            ["role"],
            registry=registry,
        )

    @contextlib.contextmanager
    def in_office(self) -> Iterator[None]:
        """While we lead, show what our planner has found last; else that is for another to show."""
        self._show_regime()
        for role in ("prefill", "decode"):
            self._scale.labels(role).set(0)
        try:
            yield
        finally:
            self._regimes.clear()
            self._scale.clear()
            self._wanted.clear()

    def _show_regime(self) -> None:
        for regime in (NORMAL, IMBALANCE, OVERLOAD):
            self._regimes.labels(regime).set(regime == self._regime)

    async def carry_out(self, orders: Iterable[Order]) -> None:
        """All of them at once. Raises nothing of what goes wrong at nodes or on NATS."""
        async with asyncio.TaskGroup() as tasks:
            for order in orders:
                match order:
                    case MoveCap():
                        tasks.create_task(self._move_cap(order))
                    case RegimeChange():
                        tasks.create_task(self._change_regime(order))
                    case ScaleWanted():
                        tasks.create_task(self._want_scale(order))

    async def _move_cap(self, order: MoveCap) -> None:
        node_id, before, epoch = order.node.node_id, self._cap_of(order.node), self._lease.epoch
        if not self._lease.is_held:
            return  # our process was held up: another may lead. What slips through is refused by its epoch
        request = SetPrefillCap(
            node=order.node, epoch=epoch, max_prefill_tokens_per_step=order.cap, reason=order.reason
        )
        subject = subjects.at(subjects.NODE_CAP, node_id)
        try:
            await self._bus.request(subject, request, Accepted, timeout_s=ORDER_TIMEOUT_S)
        except FlowKVError as error:
            log.warning("the prefill cap of %s is not moved to %d: %s", node_id, order.cap, error.message)
            return
        self._num_moves.inc()
        log.info("moved the prefill cap of %s from %s to %d: %s", node_id, before, order.cap, order.reason)
        moved = CapMoved(node=order.node, epoch=epoch, after=order.cap, reason=order.reason, before=before)
        await self._tell(subjects.event("cap_moved", node_id), moved)

    async def _change_regime(self, order: RegimeChange) -> None:
        self._regime = order.after
        self._show_regime()
        log.info("the regime is %s, it was %s: %s", order.after, order.before, order.reason)
        changed = RegimeChanged(
            epoch=self._lease.epoch, before=order.before, after=order.after, reason=order.reason
        )
        await self._tell(subjects.event("regime_changed", self._lease.holder_id), changed)

    async def _want_scale(self, order: ScaleWanted) -> None:
        self._scale.labels(order.role).set(order.change)
        if self._wanted.get(order.role, 0) == order.change:
            return  # told before
        self._wanted[order.role] = order.change
        log.info("%+d %s nodes are wanted: %s", order.change, order.role, order.reason)
        wanted = nodes.ScaleWanted(
            epoch=self._lease.epoch, role=order.role, change=order.change, reason=order.reason
        )
        await self._tell(subjects.event("scale_wanted", order.role), wanted)

    async def _tell(self, subject: str, event: msgspec.Struct) -> None:
        try:
            await self._bus.publish(subject, event)
        except FlowKVError as error:
            log.warning("not told on %s: %s", subject, error.message)
