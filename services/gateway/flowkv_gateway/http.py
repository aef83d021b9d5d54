"""Errors of the gateway alone, which never cross NATS; and what it tells clients of those that do."""

from __future__ import annotations

import asyncio
import math
import re
import sys
from typing import Any

import h11
import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from flowkv_common.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    FlowKVError,
    Full,
    Internal,
    NotFound,
    TooLarge,
    Unavailable,
)

# By these fields the scheduler says that no node could ever hold the request.
_TOO_LONG = ("prompt", "max_tokens")


class ContextLengthExceeded(BadRequest):
    """Prompt and answer together are longer than the model's context."""


class ModelNotFound(NotFound):
    """This gateway serves another model."""


class RequestTimeout(FlowKVError):
    """The client did not send its request in time."""

    code = 408


class ClientTooSlow(Cancelled):
    """The client has not read its stream for too long."""


def for_client(error: FlowKVError, deadline_s: float) -> FlowKVError:
    """What a client may know of an error in the cluster: what it can do, not how the cluster is made.

    The messages of services name subjects and nodes: they are for the log. `deadline_s` is the request's.
    """
    if isinstance(error, Full):
        retry_after_s = max(1, math.ceil(error.retry_after_s or 0.0))
        return Full(
            f"There is more work than can be done in time. Try again in {retry_after_s} s.",
            retry_after_s=error.retry_after_s,
        )
    if isinstance(error, TooLarge) or (isinstance(error, BadRequest) and error.field in _TOO_LONG):
        return ContextLengthExceeded(
            "The request is longer than can be served: shorten the prompt, or ask for fewer tokens.",
            field=error.field if error.field in _TOO_LONG else "prompt",
        )
    if isinstance(error, DeadlineExceeded):
        return DeadlineExceeded(f"The answer was not there within {deadline_s:g} s.")
    if isinstance(error, BadRequest | NotFound | Internal):
        return Internal("Internal error.")
    return Unavailable("The request can't be served now. Try again.", retry_after_s=error.retry_after_s)


CLIENT_HAS_GONE = 499
_TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    CLIENT_HAS_GONE: "request_cancelled",
    500: "server_error",
    503: "service_unavailable",
    504: "timeout_error",
}
SHOWN_STATUSES = tuple(status for status in _TYPES if status != CLIENT_HAS_GONE)
"""What requests are answered with that could be read. Broken HTTP has statuses of its own, as 431 and 505."""

_RETRYABLE = {429, 503}

_CODES: dict[type[FlowKVError], str] = {
    ContextLengthExceeded: "context_length_exceeded",
    ModelNotFound: "model_not_found",
}


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


def status_of(error: FlowKVError) -> int:
    """The HTTP status. Errors between our own services that no client can act on become 500."""
    return error.code if error.code in _TYPES else 500


def error_body(error: FlowKVError) -> bytes:
    return _body(status_of(error), error.message, error.field, _CODES.get(type(error)))


def error_response(error: FlowKVError) -> Response:
    """With `Retry-After` in whole seconds, rounded up, where trying again can help."""
    status = status_of(error)
    headers = {}
    if status in _RETRYABLE:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 0.0)))
    return Response(error_body(error), status, headers, media_type="application/json")


def plain_error(status: int, message: str) -> Response:
    """An error that is not about any one field."""
    return Response(_body(status, message, None, None), status, media_type="application/json")


def http_exception_response(request: Request, error: HTTPException) -> Response:
    """No such path, or not with this method."""
    body = _body(error.status_code, f"{error.detail}: {request.method} {request.url.path}", None, None)
    return Response(body, error.status_code, error.headers, media_type="application/json")


def _body(status: int, message: str, param: str | None, code: str | None) -> bytes:
    kind = _TYPES.get(status, "invalid_request_error")
    return msgspec.json.encode(ErrorBody(ErrorDetail(message, kind, param, code)))


_HEADER = b"x-request-id"
_MAX_BYTES = 256


class EchoRequestId:
    """ASGI middleware, around all that can respond. Ids that are very long are left out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = dict(scope.get("headers", ())).get(_HEADER, b"")
        if not 0 < len(request_id) <= _MAX_BYTES:
            await self._app(scope, receive, send)
            return

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (_HEADER, request_id)]
            await send(message)

        await self._app(scope, receive, send_with_id)


_READ_TIMEOUT_S = 30.0


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Raises TooLarge as soon as more than `max_bytes` have come, RequestTimeout, or Cancelled."""
    body = bytearray()
    try:
        async with asyncio.timeout(_READ_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise TooLarge(f"The body is over {max_bytes} bytes.")
    except TimeoutError:
        raise RequestTimeout(f"The body did not arrive within {_READ_TIMEOUT_S:g} s.") from None
    except ClientDisconnect:
        raise Cancelled("The client has gone.") from None
    return bytes(body)


class CloseWhileStopping:
    """ASGI middleware. Who asks while `stop` is set is answered, and asked to open a new connection next."""

    def __init__(self, app: ASGIApp, stop: asyncio.Event) -> None:
        self._app = app
        self._stop = stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._stop.is_set():
            await self._app(scope, receive, send)
            return

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive, send_and_close)


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
