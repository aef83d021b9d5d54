"""Server-sent events to a client that may be slow, silent or gone."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive, Send

from flowkv_gateway.errors import ClientTooSlow

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx would collect the tokens
]


class EventStream:
    """Sends events one after another; waits for the client to read, but never longer than the time-out.

    Nothing is buffered here: the server's own bounded write buffer is all that a client can fill.
    """

    def __init__(self, send: Send, send_timeout_s: float) -> None:
        self.is_started = False
        self._send = send
        self._send_timeout_s = send_timeout_s
        self._turn = asyncio.Lock()

    async def event(self, payload: bytes) -> None:
        """The first one goes out with status and headers. Raises ClientTooSlow."""
        async with self._turn:
            if not self.is_started:
                self.is_started = True
                await self._within_time({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            body = b"data: " + payload + b"\n\n"
            await self._within_time({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        """Raises ClientTooSlow."""
        await self._within_time({"type": "http.response.body", "body": b"", "more_body": False})

    async def _within_time(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await self._send(message)
        except TimeoutError:
            raise ClientTooSlow(f"Nothing was read for {self._send_timeout_s:g} s.") from None


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
