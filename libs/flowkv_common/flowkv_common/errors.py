"""What can go wrong, as one tree. An error knows its code; over the wire it is rebuilt as the same class.

FlowKVError
|- BadRequest        400  the input is wrong; `field` says where
|- NotFound          404  no such model, request or path
|- Stale             409  a message of a former life: other incarnation, older epoch, ended attempt
|- TooLarge          413  the body is over the limit
|- WrongModel        421  meant for nodes of another model
|- Full              429  no room now; `retry_after_s` says when to ask again
|- Cancelled         499  the client has gone, or its gateway
|- Internal          500  our fault
|- TransferFailed    502  the KV cache did not arrive
|- Unavailable       503  no node, no scheduler, not ready, draining
`- DeadlineExceeded  504  out of time
"""

from __future__ import annotations

import re

from flowkv_common.wire.messages import Refusal


class CannotStart(ValueError):
    """What a service needs is not there or can't be used: the message is all that its user has to read."""


class FlowKVError(Exception):
    """Base of all errors that cross a service boundary."""

    code = 500

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s

    def to_wire(self) -> Refusal:
        return Refusal(
            code=self.code, message=self.message, field=self.field, retry_after_s=self.retry_after_s
        )


class BadRequest(FlowKVError):
    code = 400


class NotFound(FlowKVError):
    code = 404


class Stale(FlowKVError):
    code = 409


class TooLarge(FlowKVError):
    code = 413


class WrongModel(FlowKVError):
    code = 421


class Full(FlowKVError):
    code = 429


class Cancelled(FlowKVError):
    code = 499


class Internal(FlowKVError):
    code = 500


class TransferFailed(FlowKVError):
    code = 502


class Unavailable(FlowKVError):
    code = 503


class DeadlineExceeded(FlowKVError):
    code = 504


_BY_CODE = {kind.code: kind for kind in FlowKVError.__subclasses__()}


def from_wire(refusal: Refusal) -> FlowKVError:
    """The error that the other side raised; an unknown code is our fault and becomes `Internal`."""
    kind = _BY_CODE.get(refusal.code, Internal)
    return kind(refusal.message, field=refusal.field, retry_after_s=refusal.retry_after_s)


def invalid_input(complaint: str) -> BadRequest:
    """What msgspec says against an input, with its path (`$.messages[0].role`) as the name of the field."""
    found = re.search(r" - at (?:`key` in )?`\$\.?([^`]*)`$", complaint)
    reason, path = (complaint[: found.start()], found[1].removesuffix("[...]")) if found else (complaint, "")
    if missing := re.search(r"missing required field `([^`]+)`", reason):
        path = f"{path}.{missing[1]}".lstrip(".")
    return BadRequest(f"{path}: {reason}" if path else reason, field=path or None)


def first_line(error: BaseException) -> str:
    """An error of a library, to be part of a sentence: its kind and how its message begins."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
