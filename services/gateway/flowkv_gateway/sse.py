"""Server-sent events to a client that may be slow, silent or gone."""

from __future__ import annotations

import asyncio
import time

from starlette.types import Message, Receive, Send

from flowkv_gateway.errors import ClientTooSlow

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx would collect the tokens
]
# An error that comes sooner still gets its own status.
HEADERS_AFTER_S = 1.0
_PING = b": ping\n\n"
# What some clients take for the end of a line, though the standard has only CR and LF. As JSON has them.
_LINE_BREAKS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


class EventStream:
    """Sends events one after another; waits for the client to read, but never longer than the time-out.

    Nothing is buffered here: the server's own bounded write buffer is all that a client can fill.
    """

    def __init__(self, send: Send, send_timeout_s: float) -> None:
        self.is_started = False
        self._send = send
        self._send_timeout_s = send_timeout_s
        self._turn = asyncio.Lock()
        self._sent_at = time.monotonic()

    async def event(self, payload: bytes) -> None:
        """The first one goes out with status and headers. `payload` is JSON. Raises ClientTooSlow."""
        if 0xE2 in payload or 0xC2 in payload:  # their first bytes
            for line_break, escaped in _LINE_BREAKS:
                payload = payload.replace(line_break, escaped)
        async with self._turn:
            if not self.is_started:
                await self._start()
            await self._body(b"data: " + payload + b"\n\n")

    async def end(self) -> None:
        """Raises ClientTooSlow."""
        await self._within_time({"type": "http.response.body", "body": b"", "more_body": False})

    async def keep_open(self, ping_s: float) -> None:
        """Until cancelled: headers after a second, then a comment after each `ping_s` of silence (0: none).

        Else a proxy would cut off a client that waits long for its first token. Raises ClientTooSlow.
        """
        await asyncio.sleep(HEADERS_AFTER_S)
        async with self._turn:
            if not self.is_started:
                await self._start()
        while ping_s:
            await asyncio.sleep(self._sent_at + ping_s - time.monotonic())
            async with self._turn:
                if time.monotonic() - self._sent_at >= ping_s:
                    await self._body(_PING)

    async def _start(self) -> None:
        await self._within_time({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        self.is_started = True

    async def _body(self, body: bytes) -> None:
        await self._within_time({"type": "http.response.body", "body": body, "more_body": True})
        self._sent_at = time.monotonic()

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
