"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}` with the right status."""

from __future__ import annotations

import math

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from flowkv_common.errors import FlowKVError
from flowkv_gateway.errors import ContextLengthExceeded, ModelNotFound

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
