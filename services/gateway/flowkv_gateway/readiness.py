"""Whether a request that is sent now would be scheduled: who schedules is asked, twice a second."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from flowkv_common.bus.connection import Bus
from flowkv_common.errors import FlowKVError
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import ReadyReply, ReadyRequest
from flowkv_gateway.cluster import Cluster

ASK_PERIOD_S = 0.5
ASK_TIMEOUT_S = 1.0
# A scheduler that dies has a successor within 2.5 s, where one stands by, and requests wait for so long.
SCHEDULER_SILENT_S = 3.0

_NO_NODE = "no node of the model is ready"


class Readiness:
    """Fed by `keep_asking`. `clock` gives monotonic seconds."""

    def __init__(self, bus: Bus, cluster: Cluster, clock: Callable[[], float] = time.monotonic) -> None:
        self._bus = bus
        self._cluster = cluster
        self._clock = clock
        self._answered_at = -math.inf
        self._why_not: str | None = None  # in the scheduler's last answer

    def why_not(self) -> str | None:
        """All that is missing, None if nothing is."""
        if not self._bus.is_connected:
            return "not connected to NATS"
        if self._clock() - self._answered_at > SCHEDULER_SILENT_S:
            missing = ["no scheduler answers"]
        else:
            missing = [self._why_not] if self._why_not else []
        if not self._cluster.has_ready_node() and _NO_NODE not in missing:
            missing.append(_NO_NODE)
        return "; ".join(missing) or None

    async def keep_asking(self) -> None:
        """Until cancelled."""
        while True:
            model = self._cluster.model()
            request = ReadyRequest(fingerprint=model.fingerprint if model else "")
            try:
                reply = await self._bus.request(
                    subjects.SCHEDULER_READY, request, ReadyReply, timeout_s=ASK_TIMEOUT_S
                )
                self._answered_at, self._why_not = self._clock(), reply.why_not
            except FlowKVError:
                pass  # what counts is the last answer
            await asyncio.sleep(ASK_PERIOD_S)
