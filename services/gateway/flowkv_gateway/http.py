"""HTTP as the gateway speaks it: strict heads, deadlines for the client's side, headers of every response."""

from __future__ import annotations

import asyncio
import re
import secrets
import ssl
import sys
from typing import Any, Self

import h11
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from flowkv_common.errors import BadRequest, Cancelled, CannotStart, TooLarge, Unavailable
from flowkv_gateway.errors import ANTHROPIC_PATH, STOPPED, RequestTimeout, error_response, json_error
from flowkv_gateway.watched import Watched

ABORT = "flowkv.abort"
"""The scope's extension that drops the connection with all that its client has not read."""

REQUEST_ID = "flowkv.request_id"
"""The scope's extension with the `x-request-id` of request and response."""

HEAD_TIMEOUT_S = 10.0
BODY_TIMEOUT_S = 30.0
_MAX_REQUEST_ID_BYTES = 256
_MAX_UNSENT_BYTES = 64 * 1024  # asyncio's bound, but with TLS it has eight times as much
_ORIGIN = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)


class TlsContext(ssl.SSLContext):
    """For a server with the certificates and the key of these files.

    They are looked at with every connection, so a renewal needs no restart. Broken files change nothing.
    """

    def __new__(cls, cert: str, key: str) -> Self:
        return super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)

    def __init__(self, cert: str, key: str) -> None:
        """Raises CannotStart if the files can't be used."""
        try:
            self._current = Watched(lambda: _tls_context(cert, key), cert, key)
        except (OSError, ValueError) as error:
            raise CannotStart(f"FLOWKV_TLS_CERT {cert}, FLOWKV_TLS_KEY {key}: {error}") from None

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """asyncio calls this for each connection. Loaded into a context, a broken pair would stay by half."""
        return self._current.content().wrap_bio(*args, **options)


def _tls_context(cert: str, key: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(cert, key, password="")  # or it would ask for one at the terminal
    return context


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Raises BadRequest for a compressed one, TooLarge as soon as more than `max_bytes` have come,
    RequestTimeout, or Cancelled.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise BadRequest(f"A body in {encoding} can't be read: send it as it is.", field="content-encoding")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise TooLarge(f"The body is over {max_bytes} bytes.")
    except TimeoutError:
        raise RequestTimeout(f"The body did not arrive within {BODY_TIMEOUT_S:g} s.") from None
    except ClientDisconnect:
        raise Cancelled("The client has gone.") from None
    return bytes(body)


def _new_request_id() -> bytes:
    return b"req-" + secrets.token_hex(12).encode()


def _with_header(send: Send, name: bytes, value: bytes) -> Send:
    async def send_with_header(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (name, value)]
        await send(message)

    return send_with_header


class CloseWhileStopping:
    """ASGI middleware: while `stop` is set, each response tells its client to open a new connection."""

    def __init__(self, app: ASGIApp, stop: asyncio.Event) -> None:
        self._app = app
        self._stop = stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._stop.is_set():
            send = _with_header(send, b"connection", b"close")
        await self._app(scope, receive, send)


class _StrictParser(h11.Connection):
    """h11 with what RFC 9112 asks of a server besides: one framing, one major version, absolute targets."""

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        request = super().next_event()
        if not isinstance(request, h11.Request):
            return request
        if not request.http_version.startswith(b"1."):
            version = request.http_version.decode()
            raise h11.RemoteProtocolError(f"HTTP/{version} is not supported.", error_status_hint=505)
        names = {name for name, _ in request.headers}
        if b"transfer-encoding" in names and (b"content-length" in names or request.http_version == b"1.0"):
            raise h11.RemoteProtocolError("The request gives the length of its body in two ways.")
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

    A client has 10 s for the head of a request, and as long for the rest of a body that was refused. Then the
    connection is closed, with a 408 if anything was sent. Broken HTTP gets an OpenAI-shaped error with status
    400, a head over the limit 431. A request that is cut off because the server stops gets a 503, unless its
    answer has begun. Every response repeats the request's x-request-id. Without one, or with a very long one,
    or if it could not be read, the request gets one of ours.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        max_head_bytes = self.config.h11_max_incomplete_event_size
        assert max_head_bytes is not None  # `serve_http` says so
        self.conn = _StrictParser(h11.SERVER, max_head_bytes)
        self._inner_app = self.app
        self.app = self._serve_request
        self._deadline: asyncio.TimerHandle | None = None

    async def _serve_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = dict(scope["headers"]).get(b"x-request-id", b"")
        if not 0 < len(request_id) <= _MAX_REQUEST_ID_BYTES:
            request_id = _new_request_id()
        send = _with_header(send, b"x-request-id", request_id)
        if scope["path"].startswith(ANTHROPIC_PATH):
            send = _with_header(send, b"request-id", request_id)
        scope["extensions"] = {ABORT: self.transport.abort, REQUEST_ID: request_id.decode("latin-1")}
        try:
            await self._inner_app(scope, receive, send)
        except asyncio.CancelledError:  # only uvicorn does this, when its time to stop is over
            if self.cycle.response_started:
                self.transport.close()
            else:
                await error_response(Unavailable(STOPPED), scope["path"])(scope, receive, send)

    # --- uvicorn calls these ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(_MAX_UNSENT_BYTES)
        self._set_deadline()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._set_deadline()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._clear_deadline()

    def send_400_response(self, msg: str) -> None:
        """Called while uvicorn handles the error of the parser."""
        error = sys.exc_info()[1]
        if isinstance(error, h11.RemoteProtocolError):
            self._refuse_and_close(error.error_status_hint, f"{msg} {error}")
        else:
            self._refuse_and_close(400, msg)

    # --- the client's deadline -------------------------------------------------------------------

    def _set_deadline(self) -> None:
        """Starts the clock where it is the client's turn to send; single bytes earn it no more time.

        Between two requests it is uvicorn's clock that runs, of the time that connections are kept alive.
        """
        theirs, ours = self.conn.their_state, self.conn.our_state
        is_their_turn = theirs is h11.IDLE or (theirs is h11.SEND_BODY and ours is h11.DONE)
        if not is_their_turn or self.transport.is_closing():
            self._clear_deadline()
        elif self._deadline is not None:
            return
        elif self.cycle is None or theirs is not h11.IDLE or self._has_part_of_request():
            self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self._on_deadline)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _has_part_of_request(self) -> bool:
        return bool(self.conn.trailing_data[0])

    def _on_deadline(self) -> None:
        self._deadline = None
        if self.conn.their_state is h11.IDLE and not self._has_part_of_request():
            self.timeout_keep_alive_handler()
        else:
            self._refuse_and_close(408, f"The request did not arrive within {HEAD_TIMEOUT_S:g} s.")

    def _refuse_and_close(self, status: int, message: str) -> None:
        """Sends the error unless a response has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json_error(status, message)
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                (b"connection", b"close"),
                (b"x-request-id", _new_request_id()),
            ]
            for event in (
                h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
