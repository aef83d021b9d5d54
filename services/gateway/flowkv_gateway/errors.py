"""Errors of the gateway alone; they never cross NATS."""

from __future__ import annotations

from flowkv_common.errors import BadRequest, Cancelled, FlowKVError, NotFound


class ContextLengthExceeded(BadRequest):
    """Prompt and answer together are longer than the model's context."""


class ModelNotFound(NotFound):
    """This gateway serves another model."""


class RequestTimeout(FlowKVError):
    """The client did not send its request in time."""

    code = 408


class ClientTooSlow(Cancelled):
    """The client has not read its stream for too long."""
