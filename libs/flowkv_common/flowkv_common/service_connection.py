"""One connection to the metrics and health of a service, which strangers can't use up.

Idle connections cost descriptors, and the sockets over which nodes move KV need some of the same.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 64
_HEAD_TIMEOUT_S = 10.0


class ServiceConnection(H11Protocol):
    """uvicorn's connection, which ends 10 s after it began unless a request is being answered.

    One more than 64 costs the oldest of those that wait for a request its place. Whoever scrapes or probes
    asks at once, and can connect again.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._end = self.loop.call_later(_HEAD_TIMEOUT_S, self.close_if_waiting)
        if len(self.connections) > MAX_CONNECTIONS:
            waiting = [other for other in self.connections if isinstance(other, ServiceConnection)]
            oldest = min(waiting, key=lambda other: (not other.is_waiting, other._since))
            oldest.close_if_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end.cancel()
        super().connection_lost(exc)

    @property
    def is_waiting(self) -> bool:
        """Whether no whole request has come that is still to be answered."""
        return self.conn.our_state is h11.IDLE

    def close_if_waiting(self) -> None:
        if self.is_waiting:
            self.transport.abort()
