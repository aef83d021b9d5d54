"""Reads a request's body, bounded in size and time."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from flowkv_common.errors import Cancelled, TooLarge
from flowkv_gateway.errors import RequestTimeout

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
