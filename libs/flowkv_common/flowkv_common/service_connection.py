"""One connection to the metrics and health of a service, which strangers can't use up.

Idle connections cost descriptors, and the sockets over which nodes move KV need some of the same.
"""

from __future__ import annotations

import asyncio
from typing import cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 64
_IDLE_TIMEOUT_S = 10.0


class ServiceConnection(H11Protocol):
    """uvicorn's connection, which ends 10 s after it began or was last answered if no whole request has come.

    One more than 64 costs the one that has waited longest for a request its place. Whoever scrapes or probes
    asks at once, and can connect again.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_request()
        if len(self.connections) > MAX_CONNECTIONS:
            connections = cast("set[ServiceConnection]", self.connections)  # a server has one kind
            longest = min(connections, key=lambda one: (not one.is_waiting, one._since))
            longest.close_if_waiting()

    def on_response_complete(self) -> None:
        self._end.cancel()
        self._wait_for_request()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end.cancel()
        super().connection_lost(exc)

    def _wait_for_request(self) -> None:
        """Starts the clock."""
        self._since = self.loop.time()
        self._end = self.loop.call_later(_IDLE_TIMEOUT_S, self.close_if_waiting)

    @property
    def is_waiting(self) -> bool:
        """Whether no whole request has come that is still to be answered."""
        return self.conn.our_state is h11.IDLE

    def close_if_waiting(self) -> None:
        if self.is_waiting:
            self.transport.abort()
