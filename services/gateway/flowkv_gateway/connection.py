"""One client's HTTP/1.1 connection: what is no HTTP is refused as an API does it, silence is not waited for.

Knows nothing of routes and answers; those have their own deadlines.
"""

from __future__ import annotations

import asyncio
import re
import sys
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from flowkv_common.errors import Unavailable
from flowkv_gateway.errors_http import error_response, plain_error
from flowkv_gateway.request_id import EchoRequestId

ABORT = "flowkv.abort"
"""The scope's extension that drops the connection with all that its client has not read."""

_HEAD_TIMEOUT_S = 10.0
_ORIGIN = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)

STOPPED = "This server has stopped before the answer was complete."


class _StrictParser(h11.Connection):
    """h11 with what RFC 9112 asks of a server besides: one framing, one major version, absolute targets."""

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super().next_event()
        return _checked(event) if isinstance(event, h11.Request) else event


def _checked(request: h11.Request) -> h11.Request:
    """The request with its target in origin form. Raises h11.RemoteProtocolError."""
    if not request.http_version.startswith(b"1."):
        version = request.http_version.decode()
        raise h11.RemoteProtocolError(f"HTTP/{version} is not spoken here.", error_status_hint=505)
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" in names and (b"content-length" in names or request.http_version == b"1.0"):
        raise h11.RemoteProtocolError("The length of the body is told in two ways.")
    if (origin := _ORIGIN.match(request.target)) is None:
        return request
    path = request.target[origin.end() :]
    return h11.Request(
        method=request.method,
        target=path if path.startswith(b"/") else b"/" + path,
        headers=request.headers,
        http_version=request.http_version,
    )


class ApiConnection(H11Protocol):
    """uvicorn's connection, with a deadline for the client's side of it.

    A client has 10 s for the head of a request, and as long for the rest of a body that was refused: then it
    is let go. One that sends nothing at all is let go as late, but without a word: who has not asked expects
    no answer. Broken HTTP gets an OpenAI-shaped error with status 400, a head over the limit 431. A request
    that is cut off because the server stops gets a 503, unless its answer has begun.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        max_head_bytes = self.config.h11_max_incomplete_event_size
        assert max_head_bytes is not None  # `serve_http` says so
        self.conn = _StrictParser(h11.SERVER, max_head_bytes)
        self._serve = self.app
        self.app = EchoRequestId(self._serve_with_abort)
        self._deadline: asyncio.TimerHandle | None = None

    async def _serve_with_abort(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["extensions"] = {ABORT: self.transport.abort}
        try:
            await self._serve(scope, receive, send)
        except asyncio.CancelledError:  # only uvicorn does this, when its time to stop is over
            if self.cycle.response_started:
                self.transport.close()
            else:
                await error_response(Unavailable(STOPPED))(scope, receive, send)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn while it handles the error of the parser."""
        error = sys.exc_info()[1]
        if isinstance(error, h11.RemoteProtocolError):
            self._refuse(error.error_status_hint, f"{msg} {error}")
        else:
            self._refuse(400, msg)

    def _watch(self) -> None:
        """Starts the clock where it is the client's turn to send; single bytes earn it no more time.

        Between two requests it is uvicorn's clock that runs, of the time that connections are kept alive.
        """
        theirs, ours = self.conn.their_state, self.conn.our_state
        is_their_turn = theirs is h11.IDLE or (theirs is h11.SEND_BODY and ours is h11.DONE)
        if not is_their_turn or self.transport.is_closing():
            self._stop_watching()
        elif self._deadline is None and (self.cycle is None or theirs is not h11.IDLE or self._has_begun()):
            self._deadline = self.loop.call_later(_HEAD_TIMEOUT_S, self._time_out)

    def _has_begun(self) -> bool:
        """Has a part of a request come?"""
        return bool(self.conn.trailing_data[0])

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _time_out(self) -> None:
        self._deadline = None
        if self.conn.their_state is h11.IDLE and not self._has_begun():
            self.timeout_keep_alive_handler()
            return
        self._refuse(408, f"The request did not arrive within {_HEAD_TIMEOUT_S:g} s.")

    def _refuse(self, status: int, message: str) -> None:
        """Says so if nothing else has been said, and closes."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = plain_error(status, message)
            headers = [*response.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
