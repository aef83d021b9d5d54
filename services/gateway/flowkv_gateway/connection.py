"""One client's HTTP/1.1 connection: what is no HTTP is refused as an API does it, silence is not waited for.

Knows nothing of routes and answers; those have their own deadlines.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from flowkv_gateway.errors_http import plain_error

ABORT = "flowkv.abort"
"""The scope's extension that drops the connection with all that its client has not read."""

_HEAD_TIMEOUT_S = 10.0


class ApiConnection(H11Protocol):
    """uvicorn's connection, with a deadline for the client's side of it.

    A client has 10 s for the head of a request, and as long for the rest of a body that was refused: then it
    is let go. Broken HTTP gets an OpenAI-shaped error with status 400, a head over the limit 431.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._serve = self.app
        self.app = self._serve_with_abort
        self._deadline: asyncio.TimerHandle | None = None

    async def _serve_with_abort(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["extensions"] = {ABORT: self.transport.abort}
        await self._serve(scope, receive, send)

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
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._refuse(status, msg)

    def _watch(self) -> None:
        """Starts the clock where it is the client's turn to send; single bytes earn it no more time."""
        theirs, ours = self.conn.their_state, self.conn.our_state
        is_their_turn = theirs is h11.IDLE or (theirs is h11.SEND_BODY and ours is h11.DONE)
        if not is_their_turn or self.transport.is_closing():
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(_HEAD_TIMEOUT_S, self._time_out)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _time_out(self) -> None:
        self._deadline = None
        self._refuse(408, f"The request did not arrive within {_HEAD_TIMEOUT_S:g} s.")

    def _refuse(self, status: int, message: str) -> None:
        """Says so if nothing else has been said, and closes."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = plain_error(status, message)
            headers = [*response.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=status, headers=headers),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
