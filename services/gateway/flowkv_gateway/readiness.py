"""Whether a request that came now would be served: by the scheduler's word, and by which nodes are ready."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Set

from flowkv_common.bus.connection import Bus
from flowkv_common.errors import FlowKVError
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import ReadyReply, ReadyRequest
from flowkv_gateway.cluster import Cluster, ModelNodes

READY_PERIOD_S = 0.5
READY_TIMEOUT_S = 1.0
# A scheduler that dies has a successor within 2.5 s, where one stands by, and requests wait for so long.
SCHEDULER_SILENT_S = 3.0
_NO_SCHEDULER = "no scheduler answers"


class Readiness:
    """What is known while `keep_asking_scheduler` runs."""

    def __init__(self, bus: Bus, cluster: Cluster) -> None:
        self._bus = bus
        self._cluster = cluster
        self.doubted: Set[str] = frozenset()  # ids of nodes, by the scheduler's last two answers
        self._scheduler_answered_at = 0.0
        self._scheduler_why_not: dict[ModelNodes, str | None] = {}  # what was missing by its last answer

    def why_not_ready(self) -> str | None:
        """What is missing for a request sent now to be served, by any model; None if nothing is."""
        if not self._bus.is_connected:
            return "not connected to NATS"
        reasons = [self._why_not(nodes) for nodes in self._cluster.models]
        return None if None in reasons else next(iter(reasons), "no model is known yet")

    def _why_not(self, nodes: ModelNodes) -> str | None:
        """What is missing for a request for this model."""
        # Just after NATS was away, the silence may have been ours.
        silent_s = min(time.monotonic() - self._scheduler_answered_at, self._bus.connected_for_s)
        answer = self._scheduler_why_not.get(nodes, _NO_SCHEDULER)
        why_not = _NO_SCHEDULER if silent_s > SCHEDULER_SILENT_S else answer
        missing = [why_not] if why_not else []
        no_node = "no node of the model is ready"  # also in the scheduler's words
        if not nodes.has_ready_node() and no_node not in missing:
            missing.append(no_node)
        return "; ".join(missing) or None

    async def keep_asking_scheduler(self) -> None:
        """Whether it would find a pair of nodes, and which are doubted, until cancelled.

        A node counts as doubted by two answers in a row: a hiccup is no reason to leave it.
        """
        doubted_before = frozenset[str]()
        while True:
            models = list(self._cluster.models)
            for gone in self._scheduler_why_not.keys() - models:
                del self._scheduler_why_not[gone]
            async with asyncio.TaskGroup() as tasks:
                asking = [tasks.create_task(self._ask_if_ready(nodes)) for nodes in models]
            doubted = frozenset[str]().union(*(task.result() for task in asking))
            self.doubted, doubted_before = doubted & doubted_before, doubted  # without an answer none
            await asyncio.sleep(READY_PERIOD_S)

    async def _ask_if_ready(self, nodes: ModelNodes) -> Set[str]:
        """Take the scheduler's word on a model. Returns the nodes that it doubts, by id."""
        request = ReadyRequest(fingerprint=nodes.model.fingerprint if nodes.model else "")
        try:
            reply = await self._bus.request(
                subjects.SCHEDULER_READY, request, ReadyReply, timeout_s=READY_TIMEOUT_S
            )
        except FlowKVError:
            return frozenset()  # what counts is the last answer
        self._scheduler_answered_at = time.monotonic()
        self._scheduler_why_not[nodes] = reply.why_not
        return frozenset(node.node_id for node in reply.doubted)
