"""Answers to requests as ADR-32 has them: a message, or a `Refusal` marked as an error by two headers."""

from __future__ import annotations

from typing import Any

import msgspec
from nats.aio.msg import Msg

from flowkv_common import errors
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Refusal, decode


def error_headers(error: errors.FlowKVError) -> dict[str, str]:
    """What marks the answer that carries `error.to_wire()`."""
    return {subjects.ERROR_HEADER: error.message, subjects.ERROR_CODE_HEADER: str(error.code)}


def open_answer(subject: str, answer: Msg, kind: Any) -> Any:
    """The `kind` in the answer of `subject`. Raises what the other side raised, or `Internal`."""
    code = (answer.headers or {}).get(subjects.ERROR_CODE_HEADER)
    if code is not None:
        raise errors.from_wire(_refusal(answer, code))
    try:
        return decode(answer.data, kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise errors.Internal(f"the answer of {subject} is no {kind}: {error}") from None


def _refusal(answer: Msg, code: str) -> Refusal:
    """The refusal in an error answer, or what the headers tell when the body is another service's."""
    try:
        return decode(answer.data, Refusal)
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = (answer.headers or {}).get(subjects.ERROR_HEADER, "error without a text")
        return Refusal(code=int(code) if code.isdecimal() else 500, message=text)
