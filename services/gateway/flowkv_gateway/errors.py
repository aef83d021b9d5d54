"""The errors that a client sees: their HTTP status, and their JSON as OpenAI or Anthropic writes it.

Services raise the errors of `flowkv_common.errors`. Those defined here never cross NATS.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import msgspec
from starlette.responses import Response

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

CLIENT_HAS_GONE = 499  # as nginx calls it: nobody reads this answer
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
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
"""Each status that a request can end with, and its `type`. Broken HTTP has others, such as 431 and 505."""

ANTHROPIC_PATH = "/v1/messages"
"""Paths that begin so are of Anthropic's API."""

_ANTHROPIC_TYPES = {**ERROR_TYPES, 413: "request_too_large", 500: "api_error", 503: "overloaded_error"}

STOPPED = "This server has stopped before the answer was complete."


class ContextLengthExceeded(BadRequest):
    """Prompt and answer together are longer than the model's context."""

    openai_code = "context_length_exceeded"


class Unauthorized(FlowKVError):
    """The request has no key, or one that is unknown."""

    code = 401
    openai_code = "invalid_api_key"


class ForeignHost(FlowKVError):
    """The request is for a host that this gateway is not."""

    code = 403


class KeyLimit(Full):
    """The request's key is over one of its limits."""

    openai_code = "rate_limit_exceeded"


class ModelNotFound(NotFound):
    """This gateway serves another model."""

    openai_code = "model_not_found"


class RequestTimeout(FlowKVError):
    """The client did not send its request in time."""

    code = 408


class ClientTooSlow(Cancelled):
    """The client has not read its stream for too long."""


@contextmanager
def naming_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Lets errors name fields as the client does: `names` has the names of ours that begin a field's."""
    try:
        yield
    except BadRequest as error:
        for ours, theirs in names.items():
            if error.field is not None and error.field.startswith(ours):
                error.field = theirs + error.field[len(ours) :]
                error.message = error.message.replace(ours, theirs)
                break
        raise


def status_of(error: FlowKVError) -> int:
    """The HTTP status. Errors between our own services that no client can act on become 500."""
    return error.code if error.code in ERROR_TYPES else 500


def json_error(
    status: int, message: str, field: str | None = None, code: str | None = None, *, path: str = ""
) -> bytes:
    """In the form of the API that the request's `path` is of."""
    if path.startswith(ANTHROPIC_PATH):
        kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error")
        if field and field not in message:
            message = f"{field}: {message}"
        return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": message}})
    kind = ERROR_TYPES.get(status, "invalid_request_error")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": field, "code": code}})


def error_body(error: FlowKVError, path: str = "") -> bytes:
    code = getattr(error, "openai_code", None)
    return json_error(status_of(error), error.message, error.field, code, path=path)


def error_response(error: FlowKVError, path: str) -> Response:
    """With `Retry-After` in whole seconds, rounded up, where trying again can help."""
    status, headers = status_of(error), {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status in (429, 503):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 0.0)))
    return Response(error_body(error, path), status, headers, media_type="application/json")


def for_client(error: FlowKVError, deadline_s: float) -> FlowKVError:
    """An error of the cluster as a client may see it: what the client can do, not how the cluster is made.

    The messages of services name subjects and nodes: they are for the log. `deadline_s` is the request's.
    """
    if isinstance(error, Full):
        retry_after_s = max(1, math.ceil(error.retry_after_s or 0.0))
        return Full(
            f"There is more work than can be done in time. Try again in {retry_after_s} s.",
            retry_after_s=error.retry_after_s,
        )
    # By these two fields the scheduler says that no node could ever hold the request.
    too_long = error.field if error.field in ("prompt", "max_tokens") else None
    if isinstance(error, TooLarge) or (isinstance(error, BadRequest) and too_long):
        return ContextLengthExceeded(
            "The request is longer than can be served: shorten the prompt, or ask for fewer tokens.",
            field=too_long or "prompt",
        )
    if isinstance(error, DeadlineExceeded):
        return DeadlineExceeded(f"The answer was not there within {deadline_s:g} s.")
    if isinstance(error, BadRequest | NotFound | Internal):
        return Internal("Internal error.")
    return Unavailable("The request can't be served now. Try again.", retry_after_s=error.retry_after_s)
