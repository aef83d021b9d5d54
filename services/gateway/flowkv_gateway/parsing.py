"""Bytes of a request body to a checked struct, or a BadRequest that names the field."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

import msgspec

from flowkv_common.errors import BadRequest

_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`$")
_MISSING = re.compile(r"missing required field `(?P<field>[^`]+)`")

# Looking for the field costs a second, slower parse, which a large broken body is not worth.
_MAX_EXPLAINED_BYTES = 64 * 1024

T = TypeVar("T")


def parse_json(body: bytes, kind: type[T]) -> T:
    """The `kind` in `body`, where numbers and booleans may be written as text, and whole numbers as 10.0.

    Raises BadRequest for anything else that bytes can be.
    """
    try:
        return msgspec.json.decode(body, type=kind, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except UnicodeDecodeError:
        raise BadRequest("The body is not valid UTF-8.") from None
    except RecursionError:
        raise BadRequest("The JSON is nested too deeply.") from None
    except msgspec.DecodeError as error:
        if field := _non_finite_field(body):
            raise BadRequest(f"{field}: NaN and Infinity are not numbers in JSON.", field=field) from None
        raise BadRequest(f"The body is not valid JSON: {error}") from None


def _invalid(message: str) -> BadRequest:
    """msgspec's message with its path (`$.messages[0].role`) turned into the name of a parameter."""
    found = _PATH.search(message)
    path = found["path"].removesuffix("[...]") if found else ""
    reason = message[: found.start()] if found else message
    if missing := _MISSING.search(message):
        path = f"{path}.{missing['field']}".lstrip(".")
    return BadRequest(f"{path}: {reason}" if path else reason, field=path or None)


def _non_finite_field(body: bytes) -> str | None:
    """The top-level field that holds a NaN or Infinity, as many JSON writers put them."""
    if len(body) > _MAX_EXPLAINED_BYTES:
        return None
    mark = object()
    try:
        fields = json.loads(body, parse_constant=lambda _: mark)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    return next((name for name, value in fields.items() if _holds(value, mark)), None)


def _holds(value: Any, mark: object) -> bool:
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if current is mark:
            return True
        if isinstance(current, dict):
            waiting.extend(current.values())
        elif isinstance(current, list):
            waiting.extend(current)
    return False
