"""Errors of the gateway alone, which never cross NATS; and what it tells clients of those that do."""

from __future__ import annotations

import math

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
